"""`ldmole launch`: starts a run with the launcher at hand, watches over it, and starts it again where that can help."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import psutil

from ldmole_dist.cluster.coordinator import Watch
from ldmole_dist.cluster.follower import Observer
from ldmole_dist.cluster.network import address_towards, interfaces
from ldmole_dist.cluster.output import say
from ldmole_dist.cluster.runners import Start, launcher_command, launcher_environment, own_devices
from ldmole_dist.cluster.verdict import Verdict
from ldmole_dist.errors import EXIT_PREEMPTED, UserError

ENTRY = Path(__file__).with_name("entry.py")
AGAIN_SECONDS = 3.0  # before another attempt
_LAUNCHER_SECONDS = 4.0  # for the launcher to end after its ranks have


def rank_command(arguments: Sequence[str]) -> list[str]:
    """What a rank runs.

    Args:
        arguments: of the `ldmole` command.
    """
    return [sys.executable, "-u", "-m", "ldmole_dist.cli", *arguments]


def supervised(
    command: Sequence[str], watch: Sequence[str], exports: Mapping[str, str], interface: str | None
) -> list[str]:
    """The command of a rank with its supervisor: a script for Python, with arguments.

    Args:
        command: of the rank.
        watch: arguments that say which job it belongs to.
        exports: environment variables for the rank.
        interface: of the network, or None.
    """
    chosen = [] if interface is None else ["--interface", interface]
    variables = [part for name, value in exports.items() for part in ("--export", f"{name}={value}")]
    return [str(ENTRY), *watch, *chosen, *variables, "--", *command]


def become_rank(
    command: Sequence[str], exports: Mapping[str, str], interface: str | None, stall_seconds: float
) -> NoReturn:
    """Where mpirun has started this process as one of several: go on as the supervisor of one rank, in its place."""
    script = supervised(command, ["--watch", "mpi", "--stall-seconds", str(stall_seconds)], exports, interface)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *script])


def own_address(start: Start) -> str:
    """Where the supervisors reach this host.

    Raises:
        UserError: where there is no such interface, or no way to the hosts.
    """
    if start.launcher == "local":
        return "127.0.0.1"
    if start.interface is not None:
        known = interfaces()
        if start.interface not in known:
            there = ", ".join(f"{name} ({address})" for name, address in known.items())
            raise UserError(f"--interface {start.interface}: this host has none of that name; it has {there}")
        return known[start.interface]
    found = ["127.0.0.1"]
    for host in start.hosts:
        try:
            found.append(address_towards(host.name))
        except OSError as error:
            raise UserError(
                f"host {host.name!r}: {error}; is the name right, and known here? If only ssh knows it: give --interface NAME"
            ) from error
    return next((address for address in found if not address.startswith("127.")), found[0])


class EndRequests:
    """Within it, SIGINT, SIGTERM and SIGHUP ask the job to save and end.

    Attributes:
        asked: whether one came.
        watch: of the job that runs.
    """

    def __init__(self) -> None:
        self.asked = False
        self.watch: Watch | Observer | None = None
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> EndRequests:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.watch is not None:
            self.watch.request_stop()


def attempt(
    start: Start,
    command: Sequence[str],
    exports: Mapping[str, str],
    stall_seconds: float,
    requests: EndRequests,
    number: int = 0,
) -> Verdict:
    """Start a job and see it to its end.

    Args:
        start: how and where.
        command: of a rank.
        exports: environment variables for the ranks.
        stall_seconds: without progress, after which it counts as failed.
        requests: to end it.
        number: of this attempt; the hosts of a job that is started by hand on each agree on it.

    Returns:
        How it ended; no process of it is left where a host can be reached.
    """
    launcher: subprocess.Popen[bytes] | None = None
    watch = requests.watch = _watch(start, stall_seconds, number)
    with tempfile.TemporaryDirectory(prefix="ldmole_") as folder:
        try:
            at = ["--watch", f"{watch.address[0]}:{watch.address[1]}", "--job", watch.job]
            script = supervised(command, at, own_devices(start, os.environ) | dict(exports), start.interface)
            argv = launcher_command(start, script, Path(folder))
            say(shlex.join(argv))
            # In a session of its own: a Ctrl-C is for this process, which passes it on in good order.
            launcher = subprocess.Popen(
                argv, env=launcher_environment(start, os.environ), stdin=subprocess.DEVNULL, start_new_session=True
            )
            return watch.serve(launcher.poll)
        finally:
            watch.close()
            requests.watch = None
            if launcher is not None:
                _end_launcher(launcher)


def _watch(start: Start, stall_seconds: float, number: int) -> Watch | Observer:
    if start.launcher != "torchrun":
        return Watch(own_address(start), secrets.token_hex(8), start.size, stall_seconds, say)
    address, _, port = start.master.rpartition(":")
    job, at = f"port {port}, attempt {number}", (address, int(port) + 1)  # hosts may spell the address differently
    if start.node_rank > 0:
        return Observer(at, job)
    return Watch(address, job, start.size, stall_seconds, say, at[1])


def _end_launcher(launcher: subprocess.Popen[bytes]) -> None:
    """The ranks are gone; what started them ends by itself, or hangs on a host that cannot be reached. No SIGTERM: DeepSpeed's
    answer to it is pkill by a pattern that other jobs on the same hosts match too."""
    try:
        own = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        own = []
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(_LAUNCHER_SECONDS)
    launcher.kill()
    launcher.wait()
    for process in own:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def attempts(
    start: Start, command: Sequence[str], exports: Mapping[str, str], stall_seconds: float, max_restarts: int
) -> int:
    """Run a job, again where it failed and that can help.

    Args:
        start, command, exports, stall_seconds: of `attempt`.
        max_restarts: how often again.

    Returns:
        The exit code; the last lines printed name who failed first.
    """
    with EndRequests() as requests:
        number = 0
        while True:
            verdict = attempt(start, command, exports, stall_seconds, requests, number)
            if verdict.failure is None:
                return verdict.code
            say(verdict.failure.text())
            if verdict.failure.final or verdict.stopped or number == max_restarts:
                return verdict.code
            time.sleep(0 if requests.asked else AGAIN_SECONDS)
            if requests.asked:
                say("asked to end: it is not started again; the same command goes on from the last checkpoint")
                return EXIT_PREEMPTED
            number += 1
            say(f"restart {number} of {max_restarts}, from the last checkpoint")
