"""Stub of srun, scontrol, squeue and sinfo, which runs tasks on the two hosts of two_hosts.py.

It sets the variables that Slurm's manual pages document. It shows that launch/slurm.sbatch and `ldmole launch` use Slurm as
documented, and nothing about a real cluster. The name under which it is called selects the command; the folder
SLURM_STUB_FOLDER holds the files `NAME.pid` of the hosts.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

COMMAND, FOLDER = Path(sys.argv[0]).name, Path(os.environ["SLURM_STUB_FOLDER"])
HOSTS = ["ldmole0", "ldmole1"]


def srun() -> int:
    """Run tasks in blocks, host by host; with --kill-on-bad-exit, the first failed task ends all others."""
    parser = argparse.ArgumentParser()
    for option in ("--overlap", "--kill-on-bad-exit"):
        parser.add_argument(option, nargs="?", const="1")
    parser.add_argument("-n", "--ntasks", type=int)
    parser.add_argument("--ntasks-per-node", type=int)
    for option in ("--nodes", "--nodelist", "--distribution", "--export", "--mpi"):
        parser.add_argument(option)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    hosts = args.nodelist.split(",")
    assert len(hosts) == int(args.nodes) and set(hosts) <= set(HOSTS)
    everything, *exports = (args.export or "ALL").split(",")
    assert everything == "ALL"
    each = args.ntasks // len(hosts)
    assert args.ntasks_per_node in (None, each) and args.distribution in (None, "block")
    tasks = []
    for task in range(args.ntasks):
        host = hosts[task // each]
        pid = (FOLDER / f"{host}.pid").read_text().strip()
        variables = {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(task),
            "SLURM_NTASKS": str(args.ntasks),
            "SLURM_STEP_NUM_TASKS": str(args.ntasks),
            "SLURM_LOCALID": str(task % each),
            "SLURM_NODEID": str(HOSTS.index(host)),
            "SLURMD_NODENAME": host,
            **dict(variable.split("=", 1) for variable in exports),
        }
        enter = ["nsenter", "-t", pid, "-n", "-u", "-m", f"--wd={os.getcwd()}"]
        tasks.append(subprocess.Popen([*enter, *args.command], env=os.environ | variables))
    worst = 0
    while any(task.poll() is None for task in tasks):
        worst = max([worst, *(task.returncode for task in tasks if task.returncode is not None)])
        if worst and args.kill_on_bad_exit:
            for task in tasks:
                task.terminate()
        time.sleep(0.1)
    return max(task.wait() for task in tasks)


def scontrol() -> int:
    """Print the hosts for "show hostnames", and log any other command, such as "requeue"."""
    if sys.argv[1:3] == ["show", "hostnames"]:
        assert sys.argv[3] == "ldmole[0-1]"
        print("\n".join(HOSTS))
    else:
        (FOLDER / "scontrol.log").open("a").write(" ".join(sys.argv[1:]) + "\n")
    return 0


def squeue() -> int:
    """Print the state of the job."""
    assert sys.argv[1:] == ["--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--format", "%T"]
    print("RUNNING")
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol, "squeue": squeue, "sinfo": lambda: 0}[COMMAND]())
