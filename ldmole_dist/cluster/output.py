"""Lines of our own among what the ranks print."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """Print a line; where the terminal is gone, nobody is there to read it."""
    with contextlib.suppress(OSError):
        print(f"launch: {text}", file=sys.stderr, flush=True)
