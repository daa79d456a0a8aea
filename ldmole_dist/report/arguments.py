"""The arguments of `ldmole report`; apart from what it does, which takes its time to import."""

from __future__ import annotations

import argparse

from ldmole_dist.cli_arguments import positive

DESCRIPTION = """Runs data through a saved adapter, in one process, and writes a self-contained page (index.html) and its
figures (PNG): lambda, experts per token, token frequency, load, co-activation, how routing moved over the run, domains."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldmole report`."""
    parser.add_argument("run_or_adapter", metavar="RUN_OR_ADAPTER", help="folder of a run, or of an adapter")
    parser.add_argument(
        "--data", metavar="FILE", help="JSON lines; default: the run's evaluation file, or its training file"
    )
    parser.add_argument("--output", metavar="FOLDER", help="default: RUN/report, or report_NAME for an adapter")
    parser.add_argument("--backbone", metavar="PATH", help="if it is not where the run or the adapter says")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of the backbone; default: the run's, or bf16"
    )
    parser.add_argument("--limit", type=positive, metavar="ROWS", help="run so many rows of the data, from its start")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="rows of a forward; default: the run's, or 8")
