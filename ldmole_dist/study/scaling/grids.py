"""Grids of the scaling study: which cells it measures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.cells import Cell

# Axes whose largest value is also measured on one rank, where nothing is sent: it separates rates of computing and sending.
ALONE = ("experts", "lora_rank", "layers", "hidden")


@dataclass(frozen=True)
class Grid:
    """A base cell, numbers of ranks, and the values that each axis takes around the base cell."""

    base: Cell
    ranks: tuple[int, ...]
    axes: Mapping[str, tuple[Any, ...]]

    def cells(self) -> list[Cell]:
        """Return every cell once.

        Raises:
            UserError: naming a value that a cell cannot have.
        """
        around = [replace(self.base, **{axis: value}) for axis, values in self.axes.items() for value in values]
        largest = [(axis, value) for axis in ALONE for value in self.axes.get(axis, ())[-1:]]
        alone = [replace(self.base, **{axis: value, "ranks": 1, "ep_size": 1}) for axis, value in largest]
        # The model that is fitted to fewer ranks is also tried on the most ranks with another dispatch.
        far = replace(self.weak()[-1], dispatch="all_to_all")
        cells = [self.base, *self.weak(), *self.strong(), *around, *alone, far]
        # Without expert parallelism the dispatch has no effect.
        distinct = dict.fromkeys(c if c.ep_size > 1 else replace(c, dispatch="auto") for c in cells)
        return [cell.checked() for cell in distinct]

    def weak(self) -> list[Cell]:
        """Return weak scaling of the base cell: fixed tokens per rank, with every ep_size that divides the ranks."""
        cells = [replace(self.base, ranks=n, ep_size=ep) for n in self.ranks for ep in range(1, n + 1) if n % ep == 0]
        return [cell for cell in cells if cell.experts % cell.ep_size == 0]

    def strong(self) -> list[Cell]:
        """Return strong scaling of the base cell: the batch of the most ranks, split among fewer by accumulation."""
        most = max(self.ranks)
        return [replace(c, accumulation=c.accumulation * most // c.ranks) for c in self.weak() if most % c.ranks == 0]


def grid_named(name: str, precision: str) -> Grid:
    """Return a grid from grids.json: "quick" takes minutes, "full" takes hours on a CPU."""
    stored = json.loads(files(__package__).joinpath("grids.json").read_text())[name]
    base = Cell(precision=precision, **stored["base"])
    return Grid(base, tuple(stored["ranks"]), {axis: tuple(values) for axis, values in stored["axes"].items()})


def overridden(grid: Grid, ranks: Sequence[int], axes: Mapping[str, Sequence[Any]]) -> Grid:
    """Return the grid on other ranks and with other values of axes; an axis with one value has it in every cell.

    Raises:
        UserError: if a number of ranks is not positive.
    """
    base, kept = grid.base, dict(grid.axes)
    numbers = tuple(sorted(set(ranks)))
    if numbers[0] < 1:
        raise UserError(f"ranks={numbers[0]} is not positive; use at least 1")
    if base.ranks not in numbers:
        base = replace(base, ranks=numbers[-1], ep_size=numbers[-1])
    for axis, values in axes.items():
        if len(values) == 1:
            base = replace(base, **{axis: values[0]})
            kept.pop(axis, None)
        else:
            kept[axis] = tuple(values)
    return Grid(base, numbers, kept)
