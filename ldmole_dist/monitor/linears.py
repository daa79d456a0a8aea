"""Layer and projection of each adapted linear, parsed from its module name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Position(NamedTuple):
    """Projection and layer of a linear; the layer is None for a linear outside the numbered layers, such as a head."""

    projection: str
    layer: int | None


class Linears:
    """Table of the adapted linears of a model, by projection and layer.

    Args:
        names: module names in the order of the model, such as "model.layers.3.self_attn.q_proj".

    Attributes:
        position: name -> projection and layer.
        projections: projections in the order of the model.
        layers: layers in ascending order, None last.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.position = _positions(list(names))
        self._name = {position: name for name, position in self.position.items()}
        self.projections = list(dict.fromkeys(position.projection for position in self.position.values()))
        layers = {position.layer for position in self.position.values()}
        self.layers = sorted(layers, key=lambda layer: math.inf if layer is None else layer)

    def name(self, projection: str, layer: int | None) -> str | None:
        """Return the name of the linear of a projection in a layer; None if there is none."""
        return self._name.get(Position(projection, layer))

    def of(self, projection: str) -> list[str]:
        """Return the names of a projection's linears, ordered by layer."""
        return [name for layer in self.layers if (name := self.name(projection, layer)) is not None]

    def values(self, projection: str, value: Callable[[str], float]) -> np.ndarray:
        """Return the value of a projection's linear in each layer, as a (layers,) array; NaN for layers without such a linear.

        Args:
            projection: projection of the linears.
            value: function that takes the name of a linear and returns its value.
        """
        names = (self.name(projection, layer) for layer in self.layers)
        return np.array([np.nan if name is None else value(name) for name in names])

    def layer_labels(self) -> list[str]:
        """Return the axis labels of the layers, "–" for None."""
        return ["–" if layer is None else str(layer) for layer in self.layers]

    def label(self, name: str) -> str:
        """Return a short label of a linear, such as "layer 3 q_proj"."""
        projection, layer = self.position[name]
        return projection if layer is None else f"layer {layer} {projection}"


def as_table(rows: Sequence[Sequence[float]], filler: float, width: int = 0) -> np.ndarray:
    """Return a rectangular array with one row per linear; linears may have different numbers of experts.

    Args:
        rows: values of each linear, such as one per expert.
        filler: value that pads shorter rows.
        width: minimum number of columns.
    """
    width = max(width, *map(len, rows))
    return np.array([[*row, *[filler] * (width - len(row))] for row in rows])


def _positions(names: list[str]) -> dict[str, Position]:
    """Return the position of each linear: the first number in its name is its layer, the last component its projection.

    Two linears may then have the same position, for example in an encoder and a decoder. For all linears with the same last
    component as these two, the projection is instead the full name with "*" in place of the layer.
    """
    split = {name: _split(name) for name in names}
    counts = Counter((pattern.rsplit(".", 1)[-1], layer) for pattern, layer in split.values())
    ambiguous = {projection for (projection, _), count in counts.items() if count > 1}
    positions = {}
    for name, (pattern, layer) in split.items():
        projection = pattern.rsplit(".", 1)[-1]
        positions[name] = Position(pattern if projection in ambiguous else projection, layer)
    return positions


def _split(name: str) -> tuple[str, int | None]:
    """Split a name into a pattern and the layer: "model.layers.3.q_proj" gives ("model.layers.*.q_proj", 3)."""
    parts = name.split(".")
    for index in range(len(parts) - 1):
        if parts[index].isdigit():
            return ".".join([*parts[:index], "*", *parts[index + 1 :]]), int(parts[index])
    return name, None
