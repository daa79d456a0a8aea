"""Heartbeats that a rank sends to its supervisor, so that a stall can be distinguished from a long computation."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal

HEARTBEAT_FD = "LDMOLE_HEARTBEAT_FD"  # environment variable with the file descriptor for heartbeats


def heartbeat(activity: str) -> None:
    """Report progress to the supervisor of this rank; do nothing if there is no supervisor.

    Args:
        activity: description of the next step of the rank, shown if the rank stalls or fails.
    """
    fd = os.environ.get(HEARTBEAT_FD)
    if fd is not None:
        # If the supervisor is slow, the pipe can be full; losing a heartbeat is harmless. If the supervisor has died, the pipe
        # is broken, and the kernel kills this process.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(int(fd), activity.encode() + b"\n")


def show_stacks() -> None:
    """Install handlers that print the stacks of all threads after a crash in native code and on SIGUSR1.

    A supervisor sends SIGUSR1 to its rank when the job has stalled.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
