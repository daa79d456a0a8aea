"""Ending a process that was a rank."""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process without the interpreter's own end: gloo's threads may still hold tensors then, and releasing one aborts
    a process whose run went well (seen with torch 2.13, once in some dozens of runs; pytorch issue 190489)."""
    for thread in threading.enumerate():  # one may be removing an old checkpoint
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    mpi = sys.modules.get("mpi4py.MPI")
    if code == 0 and mpi is not None:
        mpi.Finalize()  # mpirun takes a process that ends without it for a crash
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
