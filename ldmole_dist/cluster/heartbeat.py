"""Signs of progress that a rank gives to its supervisor, so that a stall is told from a long computation."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal

PULSE_FD = "LDMOLE_PULSE_FD"  # environment: where to write


def pulse(doing: str) -> None:
    """Say what this rank is about to do; nothing without a supervisor."""
    fd = os.environ.get(PULSE_FD)
    if fd is not None:
        # A supervisor that does not keep up misses some; one that is gone ends this process itself.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(int(fd), doing.encode() + b"\n")


def show_stacks() -> None:
    """Have every thread's stack printed on a crash outside Python, and on SIGUSR1, as from a supervisor whose rank stalls."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
