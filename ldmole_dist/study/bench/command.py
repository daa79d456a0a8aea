"""Arguments of `ldmole bench NAME`.

A benchmark's module is imported only when the benchmark runs, because importing torch takes seconds.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from ldmole_dist.cli_arguments import positive

# Name of the benchmark and of its module -> help text, and (flag, default, help text) of its option if it has one.
BENCHMARKS: dict[str, tuple[str, tuple[str, int, str] | None]] = {
    "layer": (
        "measure time and memory of one linear's experts, compared with the authors' einsum",
        ("--repeats", 5, "timed turns per formulation"),
    ),
    "dispatch": (
        "measure time and data sent of every dispatch strategy, on 2 and 4 ranks",
        ("--turns", 5, "timed turns per strategy"),
    ),
    "decide": (
        "measure how many elements the dispatch decides to send, and how long it takes to decide",
        ("--repeats", 5, "timed decisions per configuration"),
    ),
    "checkpoint": (
        "measure how long training waits for an asynchronous checkpoint",
        ("--layers", 11, "decoder layers of the model, with 9.3 million trainable parameters each"),
    ),
    "latency": (
        "measure the latency of the adapter's parts in training and generation",
        ("--turns", 5, "timed turns per part"),
    ),
    "monitor": (
        "measure how much reporting slows down an optimizer step",
        ("--turns", 8, "timed steps per level of reporting"),
    ),
    "plan": ("compare the planner's predictions with real engines", None),
}


def add_commands(bench: argparse.ArgumentParser) -> None:
    """Add the subcommands of `ldmole bench`."""
    commands = bench.add_subparsers(required=True, metavar="NAME")
    for name, (text, option) in BENCHMARKS.items():
        parser = commands.add_parser(name, help=text)
        if option:
            flag, default, meaning = option
            text = f"{meaning} (default: %(default)s)"
            parser.add_argument(flag, dest="value", metavar="N", type=positive, default=default, help=text)
        parser.set_defaults(call=_run, benchmark=name)


def _run(args: argparse.Namespace) -> int:
    main = import_module(f"ldmole_dist.study.bench.{args.benchmark}").main
    main(*([args.value] if "value" in args else []))
    return 0
