"""`ldmole scaling`: run the cells that are missing, then fit, draw and write the page."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmole_dist.errors import EXIT_PREEMPTED, UserError
from ldmole_dist.study.scaling.cells import AXES, Cell
from ldmole_dist.study.scaling.grids import full, overridden, quick

if TYPE_CHECKING:
    from ldmole_dist.study.scaling.store import Store

SCALING = """Measures optimizer steps on this machine, each configuration in processes of its own, fits a model to them and
writes one page, OUTPUT/scaling.html. Interrupted, the same command goes on where it stopped."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldmole scaling`."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="some minutes on two cores (default)")
    size.add_argument("--full", action="store_true", help="more ranks, wider and deeper models")
    parser.add_argument("--output", default="runs/scaling", help="folder of the study (default: %(default)s)")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page of what is there")
    parser.add_argument(
        "--steps", type=_positive, default=7, help="timed optimizer steps of a cell (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds after which a cell has failed (default: %(default)s)"
    )
    parser.add_argument("--ranks", help="numbers of ranks, as in 1,2,4")
    for axis in AXES[1:]:
        what = f"values of {axis} around the base cell, as in A,B; one value holds in every cell"
        parser.add_argument(f"--{axis.replace('_', '-')}", help=what)
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Run a study.

    Returns:
        0, or EXIT_PREEMPTED where it was interrupted and goes on when it is started again.

    Raises:
        UserError: for a value that cannot be had, or a folder that cannot be used.
    """
    folder = Path(args.output)
    chosen = {axis: _values(axis, text) for axis in AXES if (text := getattr(args, axis)) is not None}
    from ldmole_dist.study.scaling.store import Store, environment

    if args.page_only:
        store = Store(folder, None)
    else:
        import torch

        grid = (full if args.full else quick)("bf16" if torch.cuda.is_available() else "fp32")
        ranks = _on_one_kind_of_device(chosen.pop("ranks", None), grid.ranks)
        cells = overridden(grid, ranks, chosen).cells()
        store = Store(folder, environment(args.steps))
        try:
            _measure_missing(store, cells, args.steps, args.timeout)
            _measure_latency(store, args.full)
        except KeyboardInterrupt:
            print(f"interrupted: {folder} holds what was measured, and the same command goes on", file=sys.stderr)
            return EXIT_PREEMPTED
    from ldmole_dist.study.scaling.page import write_page

    # Nobody can do anything about PEFT asking transformers for an attribute by its old name, at every injection.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing` is deprecated")
    for line in write_page(store):
        print(line)
    return 0


def _measure_missing(store: Store, cells: Sequence[Cell], steps: int, timeout: float) -> None:
    from tqdm import tqdm

    from ldmole_dist.selftest.local_ranks import RankFailed
    from ldmole_dist.study.scaling.measure import WARMUP, measure
    from ldmole_dist.study.scaling.store import done, failed

    known = {row.cell for row in store.rows()}
    progress = tqdm(cells, unit="cell")
    for cell in progress:
        progress.set_description(f"ranks {cell.ranks}")
        if cell in known:
            continue
        try:
            row = done(cell, measure(cell, steps, WARMUP, timeout))
        except (RankFailed, OSError) as error:  # the latter where no process can be started
            row = failed(cell, error)
            tqdm.write(f"failed: {cell}: {row.status}", file=sys.stderr)
        store.add(row)


def _measure_latency(store: Store, thorough: bool) -> None:
    from ldmole_dist.study.bench import latency as bench_latency
    from ldmole_dist.study.scaling.store import reason

    if isinstance(store.latencies(), list):
        return
    latencies: list[bench_latency.Latency] | str
    try:
        latencies = bench_latency.bench_latency(bench_latency.Settings() if thorough else bench_latency.QUICK)
    except Exception as error:  # whatever it is, the page of the cells is not lost for it, and says it
        latencies = reason(error)
        print(f"failed: latency of the adapter's parts: {latencies}", file=sys.stderr)
    store.add_latencies(latencies)


def _on_one_kind_of_device(asked: list[int] | None, usual: Sequence[int]) -> list[int]:
    """Ranks go to the CPU where GPUs are too few: a study must not mix the two."""
    import torch

    gpus = torch.cuda.device_count()
    if asked and gpus and max(asked) > gpus:
        raise UserError(
            f"--ranks {max(asked)} needs as many GPUs, here are {gpus}: leave it out, or hide them to use the CPU"
        )
    return asked or [n for n in usual if not gpus or n <= gpus]


def _values(axis: str, text: str) -> list[Any]:
    default = getattr(Cell(), axis)
    try:
        return [type(default)(value) for value in text.split(",")]
    except ValueError as error:
        name = f"--{axis.replace('_', '-')}"
        raise UserError(f"{name} {text!r} must be numbers with commas between them, as in {name} 1,2") from error


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
