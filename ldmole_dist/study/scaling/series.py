"""Rows of a study that belong together, found by their settings: scaling over ranks, and cells that vary one axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from ldmole_dist.study.scaling.cells import AXES, Cell
from ldmole_dist.study.scaling.store import Measured


class Point(NamedTuple):
    """A cell and its results."""

    cell: Cell
    measured: Measured


def differing_axes(a: Cell, b: Cell) -> set[str]:
    """Return the axes in which two cells differ."""
    x, y = asdict(a), asdict(b)
    return {axis for axis in AXES if x[axis] != y[axis]}


def base_of(points: Sequence[Point]) -> Cell:
    """Return the base cell: the one with the most cells that differ from it in one axis."""
    cells = [point.cell for point in points]
    return max(cells, key=lambda cell: sum(len(differing_axes(cell, other)) == 1 for other in cells))


def along(points: Sequence[Point], base: Cell, axis: str) -> list[Point]:
    """Return the base cell and the cells that differ from it in `axis` only, in order of the axis."""
    return sorted((p for p in points if differing_axes(p.cell, base) <= {axis}), key=lambda p: getattr(p.cell, axis))


def weak(points: Sequence[Point], base: Cell) -> list[Point]:
    """Return weak scaling: the cells with as many tokens per rank as the base cell."""
    return _over_ranks(points, base, lambda cell: cell.accumulation == base.accumulation)


def strong(points: Sequence[Point], base: Cell) -> list[Point]:
    """Return strong scaling: the cells with the batch of the most ranks."""
    most = max((p.cell.ranks for p in weak(points, base)), default=1)
    return _over_ranks(points, base, lambda cell: cell.ranks * cell.accumulation == most * base.accumulation)


# One rank belongs to both.
PLACEMENTS: dict[str, Callable[[Cell], bool]] = {
    "experts on every rank": lambda cell: cell.ep_size == 1,
    "experts spread over all ranks": lambda cell: cell.ep_size == cell.ranks,
}


def speedups(points: Sequence[Point]) -> dict[Cell, float]:
    """Return the throughput of each point relative to the fewest ranks with the same placement of the experts."""
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
