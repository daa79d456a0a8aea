"""Heartbeats that a rank sends to its supervisor, so that a stall can be distinguished from a long computation."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal

HEARTBEAT_FD = "LDMOLE_HEARTBEAT_FD"  # environment variable: the file descriptor to write heartbeats to


def heartbeat(activity: str) -> None:
    """Report progress to the supervisor of this rank; do nothing if there is no supervisor.

    Args:
        activity: what the rank is about to do; shown if the rank stalls or fails.
    """
    fd = os.environ.get(HEARTBEAT_FD)
    if fd is not None:
        # The pipe is full when the supervisor is slow: losing a heartbeat is harmless. A broken pipe means that the supervisor
        # died; the kernel then kills this process.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(int(fd), activity.encode() + b"\n")


def show_stacks() -> None:
    """Print the stacks of all threads on a crash in native code and on SIGUSR1, which a supervisor sends when a rank stalls."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
