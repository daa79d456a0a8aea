"""Which cells a study runs: scaling over ranks, one axis at a time around a base cell, and a few that tell rates apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.cells import AXES, Cell

ALONE = ("experts", "lora_rank", "layers", "hidden")  # axes that are also measured on one rank, which sends nothing


@dataclass(frozen=True)
class Grid:
    """A base cell, numbers of ranks, and the values that an axis takes around the base."""

    base: Cell
    ranks: tuple[int, ...]
    axes: Mapping[str, tuple[Any, ...]]

    def cells(self) -> list[Cell]:
        """Every cell once.

        Raises:
            UserError: naming a value that a cell cannot have.
        """
        around = [replace(self.base, **{axis: value}) for axis, values in self.axes.items() for value in values]
        largest = [(axis, value) for axis in ALONE for value in self.axes.get(axis, ())[-1:]]
        alone = [replace(self.base, **{axis: value, "ranks": 1, "ep_size": 1}) for axis, value in largest]
        cells = [self.base, *self.weak(), *self.strong(), *around, *alone, *self.far()]
        # Where nothing is dispatched, how it would be makes no other cell.
        distinct = dict.fromkeys(c if c.ep_size > 1 else replace(c, dispatch="auto") for c in cells)
        return [cell.checked() for cell in distinct]

    def weak(self) -> list[Cell]:
        """Tokens of a rank fixed; experts on every rank, spread over all ranks, and over groups of ranks between the two."""
        cells = [replace(self.base, ranks=n, ep_size=ep) for n in self.ranks for ep in range(1, n + 1) if n % ep == 0]
        return [cell for cell in cells if cell.experts % cell.ep_size == 0]

    def strong(self) -> list[Cell]:
        """The batch of an optimizer step fixed: a micro-batch for each of the most ranks, shared out among fewer."""
        most = max(self.ranks)
        return [replace(c, accumulation=c.accumulation * most // c.ranks) for c in self.weak() if most % c.ranks == 0]

    def far(self) -> list[Cell]:
        """The most ranks with other settings: what a model fitted to fewer ranks is tried on."""
        return [replace(self.weak()[-1], dispatch="all_to_all")]


def quick(precision: str) -> Grid:
    """A study of a few minutes."""
    axes: dict[str, tuple[Any, ...]] = {
        "experts": (16, 64),
        "lora_rank": (32,),
        "dispatch": ("all_to_all", "gather"),
        "stage": (0, 1, 3),
        "layers": (2, 8),
        "hidden": (128, 512),
    }
    return Grid(Cell(precision=precision), (1, 2, 4), axes)


def full(precision: str) -> Grid:
    """A study of hours on a CPU, with wider and deeper models on more ranks."""
    axes: dict[str, tuple[Any, ...]] = {
        "experts": (4, 16, 32, 64, 128),
        "lora_rank": (4, 16, 32, 64),
        "dispatch": ("all_to_all", "gather"),
        "stage": (0, 1, 3),
        "layers": (4, 16, 24),
        "hidden": (256, 768, 1024),
        "seq": (128, 512),
    }
    return Grid(Cell(hidden=512, layers=8, seq=256, precision=precision), (1, 2, 4, 8), axes)


def overridden(grid: Grid, ranks: Sequence[int] | None, axes: Mapping[str, Sequence[Any]]) -> Grid:
    """The grid on other ranks or with other values of an axis; an axis that is given one value has it in every cell.

    Raises:
        UserError: where an axis is not known, or there are no such ranks.
    """
    base, kept = grid.base, dict(grid.axes)
    numbers = tuple(sorted(set(ranks or grid.ranks)))
    if numbers[0] < 1:
        raise UserError(f"ranks={numbers[0]} must be at least 1")
    if base.ranks not in numbers:
        base = replace(base, ranks=numbers[-1], ep_size=numbers[-1])
    for axis, values in axes.items():
        if axis not in AXES or axis == "ranks":
            raise UserError(f"axis {axis!r} is not known: choose from {', '.join(a for a in AXES if a != 'ranks')}")
        if len(values) == 1:
            base = replace(base, **{axis: values[0]})
            kept.pop(axis, None)
        else:
            kept[axis] = tuple(values)
    return Grid(base, numbers, kept)
