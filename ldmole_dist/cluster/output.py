"""Status lines of `ldmole launch` and of supervisors, interleaved with the output of the ranks."""

from __future__ import annotations

import contextlib
import sys


def print_status(text: str) -> None:
    """Print a status line to stderr, and ignore a failed write, for example to a terminal that was closed."""
    with contextlib.suppress(OSError):
        print(f"launch: {text}", file=sys.stderr, flush=True)
