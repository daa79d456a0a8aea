"""Counting what a rank sends to others, exactly: elements and bytes, by input group and kind.

Kinds: "counts" (the numbers of rows that ranks tell each other, an expert to be sent among them as -1), "rows" (hidden
states), "gates" (their weights), "weights" (experts), "sums" (what comes back); "grad_" + kind in the backward, "again_" +
kind where a recomputed forward repeats it.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from ldmole_dist.parallel.stopwatch import Stopwatch

FORWARD = ("rows", "gates", "weights", "sums")
KINDS = ("counts", *FORWARD, *(f"grad_{kind}" for kind in FORWARD), *(f"again_{kind}" for kind in FORWARD))


# What dispatching consists of, beside what the experts compute: deciding what moves (the exchange of counts included), and
# packing, waiting for and unpacking it.
TIMED = ("deciding", "exchanging")


class Wire:
    """What this rank sent since the last `clear`, by (input group, kind), and how long `TIMED` took if its clock is on."""

    def __init__(self) -> None:
        self.clock = Stopwatch()
        self.elements: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def clear(self) -> None:
        """Begin again."""
        self.elements.clear()
        self.bytes.clear()
        self.clock.clear()

    def table(self) -> tuple[list[str], Tensor]:
        """The input groups, the same on ranks with the same model, and (2, input groups, KINDS): elements and bytes."""
        groups = sorted({group for group, _ in self.elements})
        counters = (self.elements, self.bytes)
        numbers = [c[group, kind] for c in counters for group in groups for kind in KINDS]
        return groups, torch.tensor(numbers, dtype=torch.int64).view(2, len(groups), len(KINDS))

    def by_kind(self) -> Counter[str]:
        """Elements of all input groups."""
        total: Counter[str] = Counter()
        for (_, kind), number in self.elements.items():
            total[kind] += number
        return total


class Tally(NamedTuple):
    """Counts for one input group.

    Args:
        wire: that keeps the numbers.
        group: name of the input group.
        repeated: whether a recomputed forward sends, or the backward of a round.
    """

    wire: Wire
    group: str
    repeated: bool = False

    def add(self, kind: str, elements: int, like: Tensor) -> None:
        """Count `elements` of the dtype of `like`."""
        entry = self.group, f"again_{kind}" if self.repeated else kind
        self.wire.elements[entry] += elements
        self.wire.bytes[entry] += elements * like.element_size()
