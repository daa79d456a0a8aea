"""Where an adapted linear stands in the model: its layer and its projection, read from its name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """Of a linear; a layer of None stands outside the numbered ones (a head)."""

    projection: str
    layer: int | None


class Linears:
    """The adapted linears of a model as a table of projections by layers.

    Args:
        names: such as "model.layers.3.self_attn.q_proj", in the model's order.

    Attributes:
        place: of each name.
        projections: in the model's order.
        layers: ascending, None last.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.place = _places(list(names))
        self._name = {place: name for name, place in self.place.items()}
        self.projections = list(dict.fromkeys(place.projection for place in self.place.values()))
        layers = {place.layer for place in self.place.values()}
        self.layers = sorted(layers, key=lambda layer: math.inf if layer is None else layer)

    def name(self, projection: str, layer: int | None) -> str | None:
        """Of the linear there, if there is one."""
        return self._name.get(Place(projection, layer))

    def of(self, projection: str) -> list[str]:
        """The names of a projection's linears, by layer."""
        return [name for layer in self.layers if (name := self.name(projection, layer)) is not None]

    def values(self, projection: str, value: Callable[[str], float]) -> np.ndarray:
        """(layers,) of what `value` gives for the projection's linears; no number where there is none."""
        names = (self.name(projection, layer) for layer in self.layers)
        return np.array([np.nan if name is None else value(name) for name in names])

    def layer_labels(self) -> list[str]:
        """For an axis."""
        return ["–" if layer is None else str(layer) for layer in self.layers]

    def label(self, name: str) -> str:
        """ "layer 3 q_proj"."""
        projection, layer = self.place[name]
        return projection if layer is None else f"layer {layer} {projection}"


def as_table(rows: Sequence[Sequence[float]], filler: float, width: int = 0) -> np.ndarray:
    """What linears say of each of their experts, one row a linear, as one table: not all may have the same number.

    Args:
        rows: of any lengths.
        filler: behind the shorter ones.
        width: of the table at least.
    """
    width = max(width, *map(len, rows))
    return np.array([[*row, *[filler] * (width - len(row))] for row in rows])


def _places(names: list[str]) -> dict[str, Place]:
    """The first whole number of a name is its layer and its last part its projection; where two would stand in one place
    (an encoder's and a decoder's), the projection is the whole name without the layer."""
    split = {name: _split(name) for name in names}
    taken = Counter((pattern.rsplit(".", 1)[-1], layer) for pattern, layer in split.values())
    ambiguous = {projection for (projection, _), count in taken.items() if count > 1}
    places = {}
    for name, (pattern, layer) in split.items():
        projection = pattern.rsplit(".", 1)[-1]
        places[name] = Place(pattern if projection in ambiguous else projection, layer)
    return places


def _split(name: str) -> tuple[str, int | None]:
    """("model.layers.*.q_proj", 3) of "model.layers.3.q_proj"."""
    parts = name.split(".")
    for index in range(len(parts) - 1):
        if parts[index].isdigit():
            return ".".join([*parts[:index], "*", *parts[index + 1 :]]), int(parts[index])
    return name, None
