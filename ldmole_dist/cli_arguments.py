"""Argument types that several subcommands share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Parse a positive integer.

    Raises:
        argparse.ArgumentTypeError: if `text` is anything else.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
