"""`ldmole scaling`: measure the missing cells, fit the model and write the page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmole_dist.cli_arguments import positive
from ldmole_dist.errors import EXIT_PREEMPTED, UserError
from ldmole_dist.study.scaling.cells import AXES, Cell
from ldmole_dist.study.scaling.grids import grid_named, overridden

if TYPE_CHECKING:
    from ldmole_dist.study.scaling.store import Store

SCALING = """Measure optimizer steps of many configurations on this machine, fit a model of the step time, and write
OUTPUT/scaling.html. To resume an interrupted study, run the same command again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ldmole scaling`."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="measure the small grid: minutes on two CPU cores (default)")
    size.add_argument("--full", action="store_true", help="measure the large grid: more ranks, wider and deeper models")
    parser.add_argument("--output", default="runs/scaling", help="folder of the study (default: %(default)s)")
    parser.add_argument("--page-only", action="store_true", help="write the page of a measured study without measuring")
    parser.add_argument(
        "--steps", type=positive, default=7, help="timed optimizer steps per cell (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        help="maximum seconds per cell, including start-up; a slower cell fails (default: %(default)s)",
    )
    parser.add_argument("--ranks", help="comma-separated numbers of ranks, such as 1,2,4")
    for axis in AXES[1:]:
        text = f"comma-separated values of {axis} to measure around the base cell; a single value is set in every cell"
        parser.add_argument(f"--{axis.replace('_', '-')}", help=text)
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Run `ldmole scaling`.

    Returns:
        0, or `EXIT_PREEMPTED` after Ctrl-C; the same command then resumes the study.

    Raises:
        UserError: if an option has a value that is not supported, or the folder cannot be used.
    """
    chosen = {axis: _values(axis, text) for axis in AXES if (text := getattr(args, axis)) is not None}
    from ldmole_dist.study.scaling.page import write_page
    from ldmole_dist.study.scaling.store import Store, environment
    from ldmole_dist.study.table import markdown_table

    folder = Path(args.output)
    if args.page_only:
        store = Store(folder, None)
    else:
        cells = _cells(args.full, chosen)
        store = Store(folder, environment(args.steps))
        try:
            _measure_missing(store, cells, args.steps, args.timeout)
            _measure_latency(store, args.full)
        except KeyboardInterrupt:
            print(f"interrupted: {folder} holds the measured cells; run the same command to resume", file=sys.stderr)
            return EXIT_PREEMPTED
    model = write_page(store)
    print(f"no model was fitted: {model}" if isinstance(model, str) else markdown_table(model.error_rows()))
    print(f"page: {folder / 'scaling.html'}")
    return 0


def _cells(is_full: bool, chosen: dict[str, list[Any]]) -> list[Cell]:
    """Return the cells to measure.

    On a machine with GPUs, numbers of ranks above the number of GPUs are left out, and the precision is bf16 instead of
    fp32.

    Args:
        is_full: whether to use the "full" grid instead of "quick".
        chosen: name of an axis -> values given on the command line; "ranks" is removed.

    Raises:
        UserError: if a value is not supported, or --ranks exceeds the number of GPUs.
    """
    import torch

    gpus = torch.cuda.device_count()
    grid = grid_named("full" if is_full else "quick", "bf16" if gpus else "fp32")
    ranks = chosen.pop("ranks", None)
    if ranks and gpus and max(ranks) > gpus:
        raise UserError(
            f"--ranks {max(ranks)} exceeds the {gpus} GPUs of this machine; use {gpus} or fewer, "
            "or set CUDA_VISIBLE_DEVICES='' to measure on the CPU"
        )
    return overridden(grid, ranks or [n for n in grid.ranks if not gpus or n <= gpus], chosen).cells()


def _measure_missing(store: Store, cells: Sequence[Cell], steps: int, timeout: float) -> None:
    from tqdm import tqdm

    from ldmole_dist.selftest.local_ranks import RankFailed
    from ldmole_dist.study.scaling.measure import WARMUP, measure
    from ldmole_dist.study.scaling.store import done, failed

    known = {row.cell for row in store.rows()}
    for cell in tqdm(cells, unit="cell"):
        if cell in known:
            continue
        try:
            row = done(cell, measure(cell, steps, WARMUP, timeout))
        except (RankFailed, OSError) as error:  # OSError if a process cannot be started
            row = failed(cell, error)
            tqdm.write(f"failed: {cell}: {row.status}", file=sys.stderr)
        store.add(row)


def _measure_latency(store: Store, is_full: bool) -> None:
    from ldmole_dist.study.bench import latency
    from ldmole_dist.study.scaling.store import reason

    if isinstance(store.latencies(), list):
        return
    results: list[latency.Latency] | str
    try:
        results = latency.bench_latency(latency.Settings() if is_full else latency.QUICK)
    except Exception as error:  # the page shows the failure; the measured cells must not be lost
        results = reason(error)
        print(f"failed: latency of the adapter's parts: {results}", file=sys.stderr)
    store.add_latencies(results)


def _values(axis: str, text: str) -> list[Any]:
    default = getattr(Cell(), axis)
    try:
        return [type(default)(value) for value in text.split(",")]
    except ValueError as error:
        flag = f"--{axis.replace('_', '-')}"
        raise UserError(f"{flag} {text!r} is not a list of integers; use commas, as in {flag} 1,2") from error
