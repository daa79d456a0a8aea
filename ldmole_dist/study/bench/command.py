"""Arguments of `ldmole bench NAME`. A benchmark's module is imported when it runs: importing torch takes seconds."""

from __future__ import annotations

import argparse
from importlib import import_module

from ldmole_dist.cli_arguments import positive

# By name, which is also that of the module: help, and flag, default and help of the one option.
BENCHMARKS: dict[str, tuple[str, tuple[str, int, str] | None]] = {
    "layer": (
        "time and memory of the experts of one linear, against the authors' einsum",
        ("--repeats", 5, "timed turns of each formulation"),
    ),
    "dispatch": (
        "time and data sent of every dispatch strategy, on 2 and 4 ranks",
        ("--turns", 5, "timed turns of each strategy"),
    ),
    "decide": (
        "what the dispatch decides to send over many shapes, and how long deciding takes",
        ("--repeats", 5, "timed decisions of each shape"),
    ),
    "checkpoint": (
        "how long training waits for an asynchronous checkpoint",
        ("--layers", 11, "decoder layers of the model, with 9.3 million trainable parameters each"),
    ),
    "latency": (
        "shares of the adapter's parts in the latency of training and of generation",
        ("--turns", 5, "timed turns of each part"),
    ),
    "monitor": (
        "how much reporting slows down an optimizer step",
        ("--turns", 8, "timed steps of each level of reporting"),
    ),
    "plan": ("the planner's numbers against real engines", None),
}


def add_commands(bench: argparse.ArgumentParser) -> None:
    """Add the subcommands of `ldmole bench`."""
    commands = bench.add_subparsers(required=True, metavar="NAME")
    for name, (text, option) in BENCHMARKS.items():
        parser = commands.add_parser(name, help=text)
        if option:
            flag, default, meaning = option
            parser.add_argument(
                flag,
                dest="value",
                metavar="N",
                type=positive,
                default=default,
                help=f"{meaning} (default: %(default)s)",
            )
        parser.set_defaults(call=_run, benchmark=name)


def _run(args: argparse.Namespace) -> int:
    main = import_module(f"ldmole_dist.study.bench.{args.benchmark}").main
    main(*([args.value] if "value" in args else []))
    return 0
