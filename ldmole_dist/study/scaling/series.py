"""Select the cells of one table or figure: scaling over ranks, and variations of one axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ldmole_dist.study.scaling.cells import AXES, Cell

# Placements of the experts. A cell with one rank has both placements, so it is the first one of both series.
PLACEMENTS: dict[str, Callable[[Cell], bool]] = {
    "experts on every rank": lambda cell: cell.ep_size == 1,
    "experts spread over all ranks": lambda cell: cell.ep_size == cell.ranks,
}


def differing_axes(a: Cell, b: Cell) -> set[str]:
    """Return the names of the axes in which two cells differ."""
    return {axis for axis in AXES if getattr(a, axis) != getattr(b, axis)}


def base_of(cells: Sequence[Cell]) -> Cell:
    """Return the base cell: the cell for which the largest number of other cells differ from it in exactly one axis."""
    return max(cells, key=lambda cell: sum(len(differing_axes(cell, other)) == 1 for other in cells))


def along(cells: Iterable[Cell], base: Cell, axis: str) -> list[Cell]:
    """Return the base cell and the cells that differ from it in `axis` only, sorted by their value on that axis."""
    return sorted((c for c in cells if differing_axes(c, base) <= {axis}), key=lambda cell: getattr(cell, axis))


def weak(cells: Iterable[Cell], base: Cell) -> list[Cell]:
    """Return the cells of weak scaling, sorted by number of ranks.

    They have as many tokens per rank as the base cell, and differ from it at most in ranks and ep_size.
    """
    return _over_ranks((c for c in cells if c.accumulation == base.accumulation), base)


def strong(cells: Sequence[Cell], base: Cell) -> list[Cell]:
    """Return the cells of strong scaling, sorted by number of ranks.

    They have as many tokens per optimizer step as the weak-scaling cell with the most ranks, and differ from the base
    cell at most in ranks, ep_size and accumulation.
    """
    batch = weak(cells, base)[-1].tokens
    return _over_ranks((c for c in cells if c.tokens == batch), base)


def _over_ranks(cells: Iterable[Cell], base: Cell) -> list[Cell]:
    free = {"ranks", "ep_size", "accumulation"}
    return sorted((c for c in cells if differing_axes(c, base) <= free), key=lambda c: (c.ranks, c.ep_size))
