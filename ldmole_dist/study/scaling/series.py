"""Select the rows of a study for one table or figure: scaling over ranks, and variations of one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from ldmole_dist.study.scaling.cells import AXES, Cell
from ldmole_dist.study.scaling.store import Measured


class Point(NamedTuple):
    """A measured cell and its results."""

    cell: Cell
    measured: Measured


def differing_axes(a: Cell, b: Cell) -> set[str]:
    """Return the names of the axes in which two cells differ."""
    x, y = asdict(a), asdict(b)
    return {axis for axis in AXES if x[axis] != y[axis]}


def base_of(points: Sequence[Point]) -> Cell:
    """Return the base cell, which is the cell with the most other cells that differ from it in exactly one axis."""
    cells = [point.cell for point in points]
    return max(cells, key=lambda cell: sum(len(differing_axes(cell, other)) == 1 for other in cells))


def along(points: Sequence[Point], base: Cell, axis: str) -> list[Point]:
    """Return the base cell and the cells that differ from it in `axis` only, sorted by their value on that axis."""
    return sorted((p for p in points if differing_axes(p.cell, base) <= {axis}), key=lambda p: getattr(p.cell, axis))


def weak(points: Sequence[Point], base: Cell) -> list[Point]:
    """Return the cells of weak scaling, sorted by number of ranks.

    They have as many tokens per rank as the base cell, and differ from it at most in ranks and ep_size.
    """
    return _over_ranks(points, base, lambda cell: cell.accumulation == base.accumulation)


def strong(points: Sequence[Point], base: Cell) -> list[Point]:
    """Return the cells of strong scaling, sorted by number of ranks.

    They have as many tokens per optimizer step as the weak-scaling cell with the most ranks, and differ from the base
    cell at most in ranks, ep_size and accumulation.
    """
    most = max((p.cell.ranks for p in weak(points, base)), default=1)
    return _over_ranks(points, base, lambda cell: cell.ranks * cell.accumulation == most * base.accumulation)


# Placements of the experts. A cell with one rank has both placements, so it is the first point of both series.
PLACEMENTS: dict[str, Callable[[Cell], bool]] = {
    "experts on every rank": lambda cell: cell.ep_size == 1,
    "experts spread over all ranks": lambda cell: cell.ep_size == cell.ranks,
}


def speedups(points: Sequence[Point]) -> dict[Cell, float]:
    """Return the throughput of each cell relative to the fewest ranks with the same placement of the experts.

    Args:
        points: measured cells, ordered by number of ranks.

    Returns:
        Cell -> ratio. Cells whose placement is not in `PLACEMENTS` are missing.
    """
    ratios: dict[Cell, float] = {}
    for has_placement in PLACEMENTS.values():
        series = [p for p in points if has_placement(p.cell)]
        for cell, measured in series:
            ratios.setdefault(cell, measured.tokens_per_second / series[0].measured.tokens_per_second)
    return ratios


def _over_ranks(points: Sequence[Point], base: Cell, belongs: Callable[[Cell], bool]) -> list[Point]:
    free = {"ranks", "ep_size", "accumulation"}
    chosen = (p for p in points if differing_axes(p.cell, base) <= free and belongs(p.cell))
    return sorted(chosen, key=lambda p: (p.cell.ranks, p.cell.ep_size))
