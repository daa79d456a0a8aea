"""Argument types that several subcommands share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Parse an integer that is at least 1.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
