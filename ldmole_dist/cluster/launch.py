"""Launch of a job: run a launcher and the coordinator, and restart the job after failures."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from ldmole_dist.cluster.coordinator import Coordinator
from ldmole_dist.cluster.follower import Follower
from ldmole_dist.cluster.job_result import JobResult
from ldmole_dist.cluster.network import address_towards, interfaces
from ldmole_dist.cluster.output import print_status
from ldmole_dist.cluster.runners import LaunchSpec, device_environment, launcher_command, launcher_environment
from ldmole_dist.cluster.stop_requests import StopSignals
from ldmole_dist.errors import EXIT_PREEMPTED, UserError

ENTRY = Path(__file__).with_name("entry.py")
RESTART_SECONDS = 3.0  # pause before a restart
_LAUNCHER_SECONDS = 4.0  # time for the launcher to exit after its ranks


def rank_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that a rank runs.

    Args:
        arguments: arguments of the `ldmole` command.
    """
    return [sys.executable, "-u", "-m", "ldmole_dist.cli", *arguments]


def supervisor_command(
    command: Sequence[str], job_arguments: Sequence[str], exports: Mapping[str, str], interface: str | None
) -> list[str]:
    """Return the arguments of the Python interpreter that run the supervisor of a rank: the path of entry.py and its arguments.

    Args:
        command: command of the rank.
        job_arguments: options --coordinator, --job and --stall-seconds of entry.py, as far as they are needed.
        exports: environment variables for the rank.
        interface: network interface to use; None lets the supervisor select one.
    """
    interface_arguments = [] if interface is None else ["--interface", interface]
    variables = [part for name, value in exports.items() for part in ("--export", f"{name}={value}")]
    return [str(ENTRY), *job_arguments, *interface_arguments, *variables, "--", *command]


def exec_supervisor(
    command: Sequence[str], exports: Mapping[str, str], interface: str | None, stall_seconds: float
) -> NoReturn:
    """Replace this process, one of several that mpirun has started, with the supervisor of one rank.

    Args:
        command: command of the rank.
        exports: environment variables for the rank.
        interface: network interface to use; None lets the supervisor select one.
        stall_seconds: seconds without a heartbeat from a rank after which the job is treated as stalled.
    """
    job_arguments = ["--coordinator", "mpi", "--stall-seconds", str(stall_seconds)]
    script = supervisor_command(command, job_arguments, exports, interface)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *script])


def coordinator_address(spec: LaunchSpec) -> str:
    """Return the IPv4 address at which the supervisors reach this host.

    Raises:
        UserError: if `spec.interface` is set, and this host has no interface of that name with an IPv4 address; or if
            `spec.interface` is None, and the name of a host cannot be resolved or there is no route to the host.
    """
    if spec.launcher == "local":
        return "127.0.0.1"
    if spec.interface is not None:
        known = interfaces()
        if spec.interface not in known:
            listed = ", ".join(f"{name} ({address})" for name, address in known.items())
            raise UserError(
                f"--interface {spec.interface}: this host has no such interface with an IPv4 address, only {listed}; "
                "correct the name"
            )
        return known[spec.interface]
    found = ["127.0.0.1"]
    for host in spec.hosts:
        try:
            found.append(address_towards(host.name))
        except OSError as error:
            raise UserError(
                f"cannot find the route to host {host.name!r}: {error.strerror}; correct its name in the hostfile or in "
                "/etc/hosts, or set --interface NAME if only ssh or Slurm can resolve the host name"
            ) from error
    return next((address for address in found if not address.startswith("127.")), found[0])


def run_attempt(
    spec: LaunchSpec,
    command: Sequence[str],
    exports: Mapping[str, str],
    stall_seconds: float,
    signals: StopSignals,
    number: int = 0,
) -> JobResult:
    """Start a job, wait for its end, and return its result.

    Afterwards no process of the job is left on any reachable host, except processes that are blocked in a system call.

    Args:
        spec: launcher and hosts.
        command: command of a rank.
        exports: environment variables for the ranks.
        stall_seconds: seconds without a heartbeat from a rank after which the job is treated as stalled.
        signals: stop signals of the process; a signal stops the job.
        number: number of the attempt, from 0. With torchrun it is part of the name of the job, so it must be the same on all
            hosts.

    Raises:
        UserError: if there is no address for the coordinator (see `coordinator_address`), if the coordinator cannot listen, or
            if the launcher cannot start the ranks on these hosts and slots.
    """
    launcher: subprocess.Popen[bytes] | None = None
    coordinator = _create_coordinator(spec, stall_seconds, number)
    signals.on_stop = coordinator.request_stop
    with tempfile.TemporaryDirectory(prefix="ldmole_") as folder:
        try:
            host, port = coordinator.address
            job_arguments = ["--coordinator", f"{host}:{port}", "--job", coordinator.job]
            all_exports = device_environment(spec, os.environ) | dict(exports)
            script = supervisor_command(command, job_arguments, all_exports, spec.interface)
            argv = launcher_command(spec, script, Path(folder))
            print_status(shlex.join(argv))
            # Start a new session, so that Ctrl-C reaches only this process, which then stops all ranks together.
            launcher = subprocess.Popen(
                argv, env=launcher_environment(spec, os.environ), stdin=subprocess.DEVNULL, start_new_session=True
            )
            return coordinator.serve(launcher.poll)
        finally:
            coordinator.close()
            signals.on_stop = None
            if launcher is not None:
                _end_launcher(launcher)


def run_with_restarts(
    spec: LaunchSpec, command: Sequence[str], exports: Mapping[str, str], stall_seconds: float, max_restarts: int
) -> int:
    """Run a job, restart it up to `max_restarts` times after failures that are not permanent, and return the exit code.

    If the job fails, the end of the output names the first failure. After a stop request, the job is not restarted.

    Args:
        spec, command, exports, stall_seconds: arguments of `run_attempt`.
        max_restarts: maximum number of restarts.

    Raises:
        UserError: as in `run_attempt`.
    """
    with StopSignals() as signals:
        number = 0
        while True:
            result = run_attempt(spec, command, exports, stall_seconds, signals, number)
            if result.failure is None:
                return result.exit_code
            print_status(result.failure.report())
            if result.failure.permanent or result.stop_requested or number == max_restarts:
                return result.exit_code
            time.sleep(0 if signals.received else RESTART_SECONDS)
            if signals.received:
                print_status("stop requested: not restarted; the same command resumes from the last checkpoint")
                return EXIT_PREEMPTED
            number += 1
            print_status(f"restart {number} of {max_restarts}, from the last checkpoint")


def _create_coordinator(spec: LaunchSpec, stall_seconds: float, number: int) -> Coordinator | Follower:
    """Return the coordinator, or a follower if another host runs the coordinator."""
    if spec.launcher != "torchrun":
        address = coordinator_address(spec)
        return Coordinator(address, secrets.token_hex(8), spec.world_size, stall_seconds, print_status)
    address, _, master_port = spec.master.rpartition(":")
    # The name of the job does not contain the address, because the hosts may spell it differently.
    job, port = f"port {master_port}, attempt {number}", int(master_port) + 1
    if spec.node_rank > 0:
        return Follower((address, port), job)
    return Coordinator(address, job, spec.world_size, stall_seconds, print_status, port)


def _end_launcher(launcher: subprocess.Popen[bytes]) -> None:
    """Wait for the launcher after its ranks have ended, then kill it and its children in case it hangs on an unreachable host.

    SIGTERM is not sent, because DeepSpeed's runner (0.19.8) then runs pkill with a pattern that also matches other jobs on the
    hosts.
    """
    try:
        children = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(_LAUNCHER_SECONDS)
    launcher.kill()
    launcher.wait()
    for process in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
