"""Arguments of `ldmole report`, in a separate module so that `ldmole --help` does not import torch or matplotlib."""

from __future__ import annotations

import argparse

from ldmole_dist.cli_arguments import positive

DESCRIPTION = """Route data through a saved adapter in one process. Write a self-contained page, index.html, and its
figures as PNG files: lambda, experts per token, token frequency, load, co-activation, changes over the run, and domains."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ldmole report`."""
    parser.add_argument("run_or_adapter", metavar="RUN_OR_ADAPTER", help="path of a run or of a saved adapter")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="data file to route; required for an adapter (default: the run's evaluation data, or else its training data)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="output folder (default: RUN/report, or report_NAME for an adapter)"
    )
    parser.add_argument(
        "--backbone",
        metavar="PATH",
        help="path of the backbone (default: the path in the run's or the adapter's config)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="precision of the backbone (default: that of the run, or bf16)",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="ROWS",
        help="maximum number of rows per data source (default: data.eval_limit for the run's evaluation data, or all)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="sequences per forward (default: the run's micro_batch_size, or 8)",
    )
