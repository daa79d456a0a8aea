"""Arguments of `ldmole report`, in a module of their own so that `ldmole --help` does not import torch or matplotlib."""

from __future__ import annotations

import argparse

from ldmole_dist.cli_arguments import positive

DESCRIPTION = """Run data through a saved adapter in one process and write index.html, a self-contained page, and its figures
as PNG files: lambda, experts per token, token frequency, load, co-activation, changes over the run, domains."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ldmole report`."""
    parser.add_argument("run_or_adapter", metavar="RUN_OR_ADAPTER", help="folder of a run or of a saved adapter")
    parser.add_argument(
        "--data", metavar="FILE", help="JSON lines to route (default: the run's evaluation or training data)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder to write (default: RUN/report, or report_NAME for an adapter)"
    )
    parser.add_argument(
        "--backbone", metavar="PATH", help="path of the backbone (default: the one that the run or adapter names)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="precision of the backbone (default: the run's, or bf16)"
    )
    parser.add_argument("--limit", type=positive, metavar="ROWS", help="maximum number of rows to read (default: all)")
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="sequences per forward (default: the run's micro-batch, or 8)"
    )
