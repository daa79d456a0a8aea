"""The rows of a study that belong together, found by their settings: what scales over ranks, what varies one axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import NamedTuple

from ldmole_dist.study.scaling.cells import AXES, Cell
from ldmole_dist.study.scaling.store import Measured


class Point(NamedTuple):
    """A cell that was measured."""

    cell: Cell
    measured: Measured


def distance(a: Cell, b: Cell) -> set[str]:
    """The axes in which two cells differ."""
    x, y = asdict(a), asdict(b)
    return {axis for axis in AXES if x[axis] != y[axis]}


def base_of(points: Sequence[Point]) -> Cell:
    """The cell around which the others vary one axis: the one with most such neighbours."""
    cells = [point.cell for point in points]
    return max(cells, key=lambda cell: sum(len(distance(cell, other)) == 1 for other in cells))


def along(points: Sequence[Point], base: Cell, axis: str) -> list[Point]:
    """The base and what differs from it in this axis only, in order of the axis."""
    chosen = [p for p in points if distance(p.cell, base) <= {axis}]
    return sorted(chosen, key=lambda p: str(value) if isinstance(value := getattr(p.cell, axis), str) else value)


def weak(points: Sequence[Point], base: Cell) -> list[Point]:
    """Tokens of a rank as in the base."""
    return _over_ranks(points, base, lambda cell: cell.accumulation == base.accumulation)


def strong(points: Sequence[Point], base: Cell) -> list[Point]:
    """The batch that the most ranks have at once."""
    most = max((p.cell.ranks for p in weak(points, base)), default=1)
    return _over_ranks(points, base, lambda cell: cell.ranks * cell.accumulation == most * base.accumulation)


def replicated(points: Sequence[Point]) -> list[Point]:
    """Of a series over ranks, those with all experts on every rank."""
    return [p for p in points if p.cell.ep_size == 1]


def spread(points: Sequence[Point]) -> list[Point]:
    """Of a series over ranks, those with experts spread over all ranks; alone, a rank has them all."""
    return [p for p in points if p.cell.ep_size == p.cell.ranks]


def alike(points: Sequence[Point]) -> list[list[Point]]:
    """Points that differ in dispatch only, in groups that sent the same elements: those of a group have done the same, but for
    deciding it in auto."""
    groups: list[list[Point]] = []
    for p in points:
        same = (
            g for g in groups if distance(g[0].cell, p.cell) <= {"dispatch"} and g[0].measured.wire == p.measured.wire
        )
        if (group := next(same, None)) is None:
            groups.append([p])
        else:
            group.append(p)
    return groups


def apart(group: Sequence[Point]) -> float:
    """How far the slowest is from the fastest, relative to it."""
    seconds = [p.measured.seconds for p in group]
    return max(seconds) / min(seconds) - 1


def from_first(points: Sequence[Point]) -> Iterator[tuple[str, Point, Point]]:
    """Each placement's points, each with what the placement is and its point on the fewest ranks."""
    for label, series in PLACEMENTS:
        chosen = series(points)
        for point in chosen[1:]:
            yield label, chosen[0], point


# What "experts" are in a sentence or a legend, and the points of which that is so.
PLACEMENTS = (("experts on every rank", replicated), ("experts spread over all ranks", spread))


def _over_ranks(points: Sequence[Point], base: Cell, belongs: Callable[[Cell], bool]) -> list[Point]:
    free = {"ranks", "ep_size", "accumulation"}
    return sorted((p for p in points if distance(p.cell, base) <= free and belongs(p.cell)), key=lambda p: p.cell.ranks)
