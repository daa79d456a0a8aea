"""Exit of a process that ran as a rank."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

# Maximum wait for the threads that delete old checkpoints; the next save deletes what they leave behind.
THREADS_SECONDS = 60.0


def exit_process(code: int) -> NoReturn:
    """Wait up to THREADS_SECONDS for non-daemon threads, and exit without finalizing the Python interpreter.

    Finalization can abort a process whose run succeeded: gloo's threads may still hold tensors, and releasing one after the
    interpreter is gone crashes (seen with torch 2.13, once in a few dozen runs; pytorch issue 190489).
    """
    deadline = time.monotonic() + THREADS_SECONDS
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    mpi = sys.modules.get("mpi4py.MPI")
    if code == 0 and mpi is not None:
        mpi.Finalize()  # mpirun reports a process that exits without MPI_Finalize as crashed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
