"""`ldmole scaling`: measure the missing cells and write the page."""

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
    from ldmole_dist.study.folder import StudyFolder
    from ldmole_dist.study.scaling.rows import Row

SCALING = """Measure optimizer steps of many configurations on this machine and write OUTPUT/scaling.html. To resume an
interrupted study, run the same command again."""


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
    text = "maximum seconds per cell, including start-up; a slower cell fails (default: %(default)s)"
    parser.add_argument("--timeout", type=float, default=300.0, help=text)
    parser.add_argument("--ranks", help="comma-separated numbers of ranks, such as 1,2,4")
    for axis in AXES[1:]:
        text = f"value of {axis} in all cells, or comma-separated values, each for one variation of the base cell"
        parser.add_argument(f"--{axis.replace('_', '-')}", help=text)
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Measure the missing cells, unless --page-only is set, and write the page.

    Returns:
        0, or `EXIT_PREEMPTED` after Ctrl-C; the same command then resumes the study.

    Raises:
        UserError: if an option has a value that is not supported, the folder cannot be used, or no cell was measured.
    """
    chosen = {axis: _values(axis, text) for axis in AXES if (text := getattr(args, axis)) is not None}
    from ldmole_dist.study.folder import StudyFolder
    from ldmole_dist.study.scaling.page import write_page
    from ldmole_dist.study.scaling.rows import environment, stored_row

    folder = Path(args.output)
    if args.page_only:
        study = StudyFolder(folder, None, stored_row)
    else:
        cells = _cells(args.full, chosen)
        study = StudyFolder(folder, environment(args.steps), stored_row)
        try:
            measure_missing(study, cells, args.steps, args.timeout)
        except KeyboardInterrupt:
            print(
                f"interrupted: {folder} holds the measured cells; run the same command again to resume", file=sys.stderr
            )
            return EXIT_PREEMPTED
    write_page(study)
    print(f"page: {folder / 'scaling.html'}")
    return 0


def _cells(is_full: bool, chosen: dict[str, list[Any]]) -> list[Cell]:
    """Return the cells to measure.

    On a machine with GPUs, the precision is bf16 instead of fp32 unless `chosen` sets it, and the grid's numbers of ranks
    that exceed the number of GPUs are left out.

    Args:
        is_full: whether to use the "full" grid instead of "quick".
        chosen: name of an axis -> values given on the command line; "ranks" is removed from this dict.

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


def measure_missing(study: StudyFolder[Row], cells: Sequence[Cell], steps: int, timeout: float) -> None:
    """Measure the cells that have no row in the study, and add their rows.

    Args:
        study: folder of the study.
        cells: all cells of the study.
        steps: number of timed optimizer steps of a cell.
        timeout: seconds after which a cell fails. A failed cell gets a row with the error, and the others run.
    """
    from tqdm import tqdm

    from ldmole_dist.selftest.local_ranks import RankFailed
    from ldmole_dist.study.scaling import measure
    from ldmole_dist.study.scaling.rows import Row, reason

    known = {row.cell for row in study.rows()}
    for cell in tqdm(cells, unit="cell"):
        if cell in known:
            continue
        try:
            row = Row(cell, measure.measure(cell, steps, measure.WARMUP, timeout))
        except (RankFailed, OSError) as error:  # OSError if a process cannot be started
            row = Row(cell, error=reason(error))
            tqdm.write(f"failed: {cell}: {row.error}", file=sys.stderr)
        study.add(row)


def _values(axis: str, text: str) -> list[Any]:
    """Return the comma-separated values of an axis, converted to the type of this field of `Cell`.

    Raises:
        UserError: if a value cannot be converted.
    """
    default = getattr(Cell(), axis)
    try:
        return [type(default)(value) for value in text.split(",")]
    except ValueError as error:
        flag = f"--{axis.replace('_', '-')}"
        raise UserError(f"{flag} {text!r} is not a list of integers; use commas, as in {flag} 1,2") from error
