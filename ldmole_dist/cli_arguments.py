"""Argument types that several subcommands share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An argument that is a number of things, at least one."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
