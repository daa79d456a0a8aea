"""Argument types that several subcommands share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Return the value of an argument that must be a positive integer.

    Raises:
        argparse.ArgumentTypeError: if `text` is not a positive integer in decimal digits.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
