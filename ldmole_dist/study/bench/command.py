"""`ldmole bench WHAT`: arguments, and what each calls. A benchmark is imported when it is called."""

from __future__ import annotations

import argparse

from ldmole_dist.cli_arguments import positive


def add_commands(bench: argparse.ArgumentParser) -> None:
    """Give the parser of `ldmole bench` its subcommands."""
    commands = bench.add_subparsers(required=True, metavar="WHAT")
    layer = commands.add_parser("layer", help="the experts of one linear against the authors' formulation")
    layer.add_argument("--repeats", type=positive, default=5, help="timed runs of each, interleaved")
    layer.set_defaults(call=_layer)
    dispatch = commands.add_parser(
        "dispatch", help="strategies that bring tokens and experts together, on 2 and 4 ranks"
    )
    dispatch.add_argument("--turns", type=positive, default=5, help="timed runs of each, interleaved")
    dispatch.set_defaults(call=_dispatch)
    decide = commands.add_parser(
        "decide", help="what a dispatch decides to move over many shapes, and what deciding costs"
    )
    decide.add_argument("--repeats", type=positive, default=5, help="timed runs of each")
    decide.set_defaults(call=_decide)
    checkpoint = commands.add_parser("checkpoint", help="what a checkpoint in the background costs training")
    checkpoint.add_argument("--layers", type=positive, default=11, help="of the model: 9.3 million parameters each")
    checkpoint.set_defaults(call=_checkpoint)
    latency = commands.add_parser("latency", help="the adapter's parts in the latency of training and of generation")
    latency.add_argument("--turns", type=positive, default=5, help="timed runs of each, interleaved")
    latency.set_defaults(call=_latency)
    monitor = commands.add_parser("monitor", help="what watching a run costs it")
    monitor.add_argument("--turns", type=positive, default=8, help="timed steps of each kind, interleaved")
    monitor.set_defaults(call=_monitor)
    commands.add_parser("plan", help="the planner's numbers against real engines").set_defaults(call=_plan)


def _layer(args: argparse.Namespace) -> int:
    from ldmole_dist.study.bench.layer import DEFAULT_CASES, bench_layer, print_table

    print_table(bench_layer(DEFAULT_CASES, args.repeats))
    return 0


def _dispatch(args: argparse.Namespace) -> int:
    from ldmole_dist.study.bench.dispatch import Sizes, bench_dispatch, print_table

    print_table(bench_dispatch(turns=args.turns), Sizes())
    from ldmole_dist.study.bench.overlap import bench_overlap, print_overlap

    print_overlap(bench_overlap(turns=args.turns))
    return 0


def _decide(args: argparse.Namespace) -> int:
    from ldmole_dist.study.bench.decide import CELLS, decide, print_table

    print_table(decide(cell, args.repeats) for cell in CELLS)
    return 0


def _checkpoint(args: argparse.Namespace) -> int:
    from ldmole_dist.study.bench.checkpoint import Sizes, bench_checkpoint, print_measured

    print_measured(bench_checkpoint(Sizes(layers=args.layers)))
    return 0


def _latency(args: argparse.Namespace) -> int:
    from ldmole_dist.study.bench.latency import Settings, bench_latency, print_table

    print_table(bench_latency(Settings(turns=args.turns)))
    return 0


def _monitor(args: argparse.Namespace) -> int:
    from ldmole_dist.config import Run
    from ldmole_dist.study.bench.monitor import Sizes, bench_monitor, print_measured

    ranks = 2
    print_measured(bench_monitor(ranks, turns=args.turns), Sizes(), ranks, Run("").detail_every)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from ldmole_dist.study.bench.plan_accuracy import bench_plan, print_table

    print_table(bench_plan())
    return 0
