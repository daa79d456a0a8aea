"""Grids of the scaling study. A grid defines the cells to measure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.cells import SIZES, Cell


@dataclass(frozen=True)
class Grid:
    """Base cell, numbers of ranks and values of axes, from which the cells of the study are derived.

    Args:
        base: cell from which all others are derived.
        ranks: numbers of ranks for weak and strong scaling.
        axes: name of an axis -> values; for each value there is a cell that differs from the base cell in this axis
            only.
    """

    base: Cell
    ranks: tuple[int, ...]
    axes: Mapping[str, tuple[Any, ...]]

    def cells(self) -> list[Cell]:
        """Return all cells of the grid without duplicates.

        Raises:
            UserError: if a cell has a value that is not supported.
        """
        around = [replace(self.base, **{axis: value}) for axis, values in self.axes.items() for value in values]
        # The last value of each size is also measured on one rank, where its time contains no communication.
        largest = {axis: values[-1] for axis, values in self.axes.items() if axis in SIZES}
        alone = [replace(self.base, **{axis: value}, ranks=1, ep_size=1) for axis, value in largest.items()]
        cells = [self.base, *self.weak(), *self.strong(), *around, *alone]
        # Without expert parallelism the dispatch has no effect, so cells that differ in it only are duplicates.
        distinct = dict.fromkeys(c if c.ep_size > 1 else replace(c, dispatch="auto") for c in cells)
        return [cell.checked() for cell in distinct]

    def weak(self) -> list[Cell]:
        """Return the cells of weak scaling: fixed tokens per rank, and every ep_size that divides ranks and experts."""
        cells = [replace(self.base, ranks=n, ep_size=ep) for n in self.ranks for ep in range(1, n + 1) if n % ep == 0]
        return [cell for cell in cells if cell.experts % cell.ep_size == 0]

    def strong(self) -> list[Cell]:
        """Return the cells of strong scaling: all have the batch size that weak scaling has with the most ranks.

        Fewer ranks accumulate more micro-batches. Numbers of ranks that do not divide the largest one are left out.
        """
        most = max(self.ranks)
        return [replace(c, accumulation=c.accumulation * most // c.ranks) for c in self.weak() if most % c.ranks == 0]


def grid_named(name: str, precision: str) -> Grid:
    """Load a grid from grids.json.

    Args:
        name: "quick", which takes minutes, or "full", which takes hours on a CPU.
        precision: precision of all cells, "fp32" or "bf16".
    """
    stored = json.loads(files(__package__).joinpath("grids.json").read_text())[name]
    base = Cell(precision=precision, **stored["base"])
    return Grid(base, tuple(stored["ranks"]), {axis: tuple(values) for axis, values in stored["axes"].items()})


def overridden(grid: Grid, ranks: Sequence[int], axes: Mapping[str, Sequence[Any]]) -> Grid:
    """Return a grid with other numbers of ranks and other values on some axes.

    Args:
        grid: grid to start from.
        ranks: numbers of ranks. If the base cell's number of ranks is not among them, its `ranks` and `ep_size` are set to
            the largest.
        axes: name of an axis -> values that replace those of the grid. An axis with a single value is no longer varied:
            the value is set in the base cell, from which all cells are derived.

    Raises:
        UserError: if a number of ranks is not positive.
    """
    base, numbers = grid.base, tuple(sorted(set(ranks)))
    if numbers[0] < 1:
        raise UserError(f"ranks={numbers[0]} is not positive; use 1 or more")
    if base.ranks not in numbers:
        base = replace(base, ranks=numbers[-1], ep_size=numbers[-1])
    single = {axis: values[0] for axis, values in axes.items() if len(values) == 1}
    varied = {axis: tuple(values) for axis, values in {**grid.axes, **axes}.items() if axis not in single}
    return Grid(replace(base, **single), numbers, varied)
