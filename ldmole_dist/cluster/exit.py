"""Ending a process that was a rank."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

THREADS_SECONDS = 60.0  # for a thread that removes an old checkpoint; the next save removes what it leaves


def leave(code: int) -> NoReturn:
    """End this process without the interpreter's own end: gloo's threads may still hold tensors then, and releasing one aborts
    a process whose run went well (seen with torch 2.13, once in some dozens of runs; pytorch issue 190489)."""
    deadline = time.monotonic() + THREADS_SECONDS
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    mpi = sys.modules.get("mpi4py.MPI")
    if code == 0 and mpi is not None:
        mpi.Finalize()  # mpirun takes a process that ends without it for a crash
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
