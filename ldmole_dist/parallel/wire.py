"""Exact counters of what a rank sends to other ranks: elements and bytes, by input group and kind.

Kinds: "counts" (numbers of rows and of active tokens, exchanged before a dispatch; -1 requests an expert), "rows"
(hidden states), "gates" (the routing weights of those rows), "weights" (experts), "sums" (partial sums returned to the rank of
the tokens). Gradients sent by the backward are counted as "grad_" + kind, elements that a recomputed forward sends again as
"again_" + kind.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from ldmole_dist.parallel.stopwatch import Stopwatch

FORWARD = ("rows", "gates", "weights", "sums")
KINDS = ("counts", *FORWARD, *(f"grad_{kind}" for kind in FORWARD), *(f"again_{kind}" for kind in FORWARD))

# The parts of a dispatch that are timed; the computation of the experts is not. "deciding": deciding what to send, including
# the exchange of counts. "exchanging": packing the payloads of an all-to-all, starting it, waiting for it and unpacking
# what was received, in the forward and in the backward.
TIMED = ("deciding", "exchanging")


class Wire:
    """Elements and bytes that this rank sent since the last `clear`, by (input group, kind).

    Attributes:
        clock: time spent in the parts named in `TIMED`; measures only while `clock.on` is True.
        elements: number of elements sent, by (input group, kind).
        bytes: number of bytes sent, by (input group, kind).
    """

    def __init__(self) -> None:
        self.clock = Stopwatch()
        self.elements: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def clear(self) -> None:
        """Reset all counters and the clock."""
        self.elements.clear()
        self.bytes.clear()
        self.clock.clear()

    def table(self) -> tuple[list[str], Tensor]:
        """Return the counters as one tensor, which can be summed over ranks with the same model.

        Returns:
            Names of the input groups, sorted, and a (2, groups, len(KINDS)) int64 tensor: elements, then bytes.
        """
        groups = sorted({group for group, _ in self.elements})
        counters = (self.elements, self.bytes)
        numbers = [c[group, kind] for c in counters for group in groups for kind in KINDS]
        return groups, torch.tensor(numbers, dtype=torch.int64).view(2, len(groups), len(KINDS))

    def by_kind(self) -> Counter[str]:
        """Return the number of elements of each kind, summed over all input groups."""
        total: Counter[str] = Counter()
        for (_, kind), number in self.elements.items():
            total[kind] += number
        return total


class Tally(NamedTuple):
    """Counter for one input group.

    Args:
        wire: counters to add to.
        group: name of the input group.
        repeated: whether a recomputed forward sends the elements, in the backward of a checkpointed region or of a round; they
            are then counted as "again_" + kind.
    """

    wire: Wire
    group: str
    repeated: bool = False

    def add(self, kind: str, elements: int, like: Tensor) -> None:
        """Add `elements` to the counter of `kind`, and their size in the dtype of `like` to the counter of bytes."""
        entry = self.group, f"again_{kind}" if self.repeated else kind
        self.wire.elements[entry] += elements
        self.wire.bytes[entry] += elements * like.element_size()
