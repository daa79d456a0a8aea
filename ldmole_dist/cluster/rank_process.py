"""Process of one rank, with its output and heartbeats."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

import psutil

from ldmole_dist.cluster.heartbeat import HEARTBEAT_FD
from ldmole_dist.cluster.relay import Relay

LAST_LINES = 12  # maximum number of output lines in an error report
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_libc = ctypes.CDLL(None)


class RankProcess:
    """Process of a rank.

    All descendants of the current process are treated as part of the rank, because a supervisor has no other children.

    Args:
        command: command of the rank.
        environment: environment variables of the rank.

    Attributes:
        heartbeat_fd: file descriptor that becomes readable when a heartbeat arrives.
        activity: text of the last heartbeat; "" before the first one.
        heartbeat_at: reading of `time.monotonic` at the last heartbeat or, before the first one, at the start.

    Raises:
        OSError: if the command cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.activity, self.heartbeat_at = "", time.monotonic()
        # Non-blocking at both ends, so that a slow supervisor never blocks the rank. This process keeps the write end open too;
        # otherwise the pipe would stay readable (end of file) after the exit of the rank.
        self.heartbeat_fd, write_fd = os.pipe2(os.O_NONBLOCK)
        self._process = subprocess.Popen(
            command,
            env={**environment, HEARTBEAT_FD: str(write_fd)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C reaches `ldmole launch` only
            pass_fds=[write_fd],
            preexec_fn=_die_with_parent,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self._relays = [Relay(self._process.stdout, 1), Relay(self._process.stderr, 2)]
        for relay in self._relays:
            relay.start()

    @property
    def exit_code(self) -> int | None:
        """Exit code as `subprocess` reports it; None while the process runs."""
        return self._process.poll()

    @property
    def suspended(self) -> bool:
        """Whether the process is stopped by a signal (SIGSTOP)."""
        try:
            with open(f"/proc/{self._process.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    @property
    def output_broken(self) -> bool:
        """Whether the output of the rank cannot be written any more, for example because its reader has exited."""
        return any(relay.broken for relay in self._relays)

    def read_heartbeats(self, now: float) -> None:
        """Set `activity` and `heartbeat_at` from the heartbeats that have arrived; `heartbeat_fd` must be readable.

        Args:
            now: reading of `time.monotonic`.
        """
        *_, last, _ = os.read(self.heartbeat_fd, 65536).split(b"\n")
        self.activity, self.heartbeat_at = last.decode(errors="replace"), now

    def last_lines(self) -> list[str]:
        """Return at most LAST_LINES lines: the last of stderr, preceded by the last of stdout if stderr has fewer."""
        return [line for relay in self._relays for line in relay.last_lines(LAST_LINES)][-LAST_LINES:]

    def terminate(self) -> None:
        """Send SIGTERM, on which a training rank saves a checkpoint and exits."""
        self._process.terminate()

    def print_stacks(self) -> None:
        """Send SIGUSR1 to a running rank, on which it prints the stacks of its threads, and wait 1 s for the output."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(1)  # the rank has no way to report that the stacks are printed

    def kill(self) -> None:
        """Kill the rank and all other descendants of this process, also in other sessions, and write the rest of the output.

        Processes that are blocked in a system call, and output that cannot be written within 1 s, are left behind.
        """
        while running := [process for process in psutil.Process().children(recursive=True) if _is_running(process)]:
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _, alive = psutil.wait_procs(running, timeout=2)
            if alive:  # blocked in a system call, by a device or a file system; they exit when the call returns
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        for relay in self._relays:
            relay.join(1)


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process, so that `RankProcess.kill` finds them."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def count_oom_kills() -> int:
    """Return the number of processes that the kernel of this host has killed for lack of memory since the host booted.

    The number is 0 if the kernel does not report it.
    """
    with open("/proc/vmstat") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
