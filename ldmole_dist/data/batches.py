"""One order of the examples for all ranks, cut into optimizer steps and micro-batches.

The sequence of examples depends on seed, data and position only: all examples in a new order each epoch, or, where sources have
weights, a draw of the source for each position and the examples of each source in a new order each time that it has been gone
through. An optimizer step takes the next `global_batch_size` of it
whatever the number of ranks, sorts them by length and cuts them into micro-batches of like length, which are dealt out to the
ranks in turn: the micro-batches, too, are the same for any number of ranks. Epochs follow each other without a gap: no step is
short.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ldmole_dist.config import Config, Source
from ldmole_dist.data.encode import Encoded
from ldmole_dist.data.permutation import Permutation
from ldmole_dist.loss import IGNORED
from ldmole_dist.parallel.placement import seeded

DRAWN_AT_ONCE = 1024  # sources of so many positions


class Mixture(NamedTuple):
    """Sources of which the sequence has shares.

    Args:
        sizes: examples of each source, which follow each other.
        weights: of each source, positive.
    """

    sizes: list[int]
    weights: list[float]


def mixture_of(data: str | Sequence[Source], sizes: Sequence[int]) -> Mixture | None:
    """The mixture that a config asks for; None where every example is seen once an epoch.

    Args:
        data: of the config.
        sizes: examples of each source.
    """
    weights = [] if isinstance(data, str) else [source.weight for source in data if source.weight is not None]
    return Mixture(list(sizes), weights) if weights else None


class Pool:
    """Examples that are gone through again and again, each time in another order.

    Args:
        first: index of the first.
        size: number of them.
        seed: of the orders.
    """

    def __init__(self, first: int, size: int, seed: int) -> None:
        self.first, self.size, self.seed = first, size, seed
        self._epoch, self._permutation = -1, Permutation(1)

    def example(self, position: int) -> int:
        """The example at a position of the endless sequence."""
        epoch, index = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, Permutation(self.size, self.seed, epoch)
        return self.first + self._permutation(index)


class TrainingOrder:
    """Which examples each rank sees at each optimizer step.

    Args:
        lengths: of each example, by which a step's are grouped.
        global_batch_size: examples of an optimizer step.
        micro_batch_size: examples of one forward on one rank.
        world_size: number of ranks.
        seed: of the shuffles.
        mixture: of sources with weights; None: all examples once an epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int,
        seed: int,
        mixture: Mixture | None = None,
    ) -> None:
        self.lengths, self.seed, self.mixture = lengths, seed, mixture
        self.global_batch_size, self.micro_batch_size, self.world_size = global_batch_size, micro_batch_size, world_size
        sizes = [len(lengths)] if mixture is None else mixture.sizes
        starts = accumulate(sizes, initial=0)
        # With one source its seed is the run's.
        self._pools = [
            Pool(first, size, seed + 7919 * i) for i, (first, size) in enumerate(zip(starts, sizes, strict=False))
        ]
        self._blocks: list[Tensor] = []  # the source of each position, by blocks
        self._before: list[Tensor] = [torch.zeros(len(sizes), dtype=torch.long)]  # draws of each source before a block

    def step(self, step: int) -> list[int]:
        """Examples of optimizer step `step` (from 0) over all ranks, in the global order."""
        first = step * self.global_batch_size
        return [self._example(position) for position in range(first, first + self.global_batch_size)]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """The same, as this rank's micro-batches."""
        by_length = sorted(self.step(step), key=lambda example: self.lengths[example])
        size = self.micro_batch_size
        micro_batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        return micro_batches[rank :: self.world_size]

    def _example(self, position: int) -> int:
        if self.mixture is None:
            return self._pools[0].example(position)
        block, place = divmod(position, DRAWN_AT_ONCE)
        while len(self._blocks) <= block:  # who goes on with a run draws what was drawn before again
            generator = seeded(self.seed, "mixture", len(self._blocks))
            weights = torch.tensor(self.mixture.weights, dtype=torch.float64)
            drawn = torch.multinomial(weights, DRAWN_AT_ONCE, replacement=True, generator=generator)
            self._blocks.append(drawn)
            self._before.append(self._before[-1] + drawn.bincount(minlength=len(self._pools)))
        source = int(self._blocks[block][place])
        earlier = int(self._before[block][source]) + int((self._blocks[block][:place] == source).sum())
        return self._pools[source].example(earlier)


def digest_of(examples: Sequence[Encoded]) -> str:
    """Of the contents of a training set."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{len(example.input_ids)} {sum(example.input_ids)} {example.labels}\n".encode())
    return digest.hexdigest()[:16]


def describe_order(
    config: Config, examples: int, contents: str, mixture: Mixture | None = None
) -> dict[str, int | str]:
    """What the order of the examples depends on: who goes on with a run must have all of it as it was.

    Args:
        config: of the run.
        examples: number of them.
        contents: a digest.
        mixture: of sources with weights.
    """
    described: dict[str, int | str] = {
        "global_batch_size": config.optimisation.global_batch_size,
        "seed": config.run.seed,
        "examples": examples,
        "contents": contents,
    }
    if mixture is not None:
        described["mixture"] = f"{mixture.weights} of {mixture.sizes}"
    return described


def collate(examples: Sequence[Encoded], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Pad on the right to the longest.

    Args:
        examples: B sequences.
        pad_id: for input_ids.
        device: where the batch goes.

    Returns:
        input_ids, attention_mask (B, S) and labels (B, S) or (B,).
    """
    width = max(len(e.input_ids) for e in examples)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    batch = {
        "input_ids": [padded(e.input_ids, pad_id) for e in examples],
        "attention_mask": [padded([1] * len(e.input_ids), 0) for e in examples],
        "labels": [e.labels if isinstance(e.labels, int) else padded(e.labels, IGNORED) for e in examples],
    }
    return {name: torch.tensor(value, device=device) for name, value in batch.items()}


def pack(examples: Sequence[Encoded], device: torch.device) -> dict[str, Tensor]:
    """One after the other in one row. Without an attention mask, transformers takes positions that begin anew for the start of
    a sequence that does not see the one before.

    Args:
        examples: sequences of T tokens together, each with token labels.
        device: where the batch goes.

    Returns:
        input_ids, position_ids and labels (1, T).
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for example in examples:
        assert isinstance(example.labels, list)  # the config's check says that there are no classes
        ids += example.input_ids
        positions += range(len(example.input_ids))
        labels += [IGNORED, *example.labels[1:]]  # the sequence before does not predict how this one begins
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([values], device=device) for name, values in batch.items()}


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Number of tokens that are not padding, a scalar.

    Args:
        batch: from `collate` or `pack`.
    """
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).sum()
