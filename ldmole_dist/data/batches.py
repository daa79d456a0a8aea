"""Order of the training examples, and batches of tensors.

The sequence of examples depends only on the seed, the data and the position. Without source weights, each epoch has all
examples in a new order. With weights, each position has a random source, and each pass through a source has a new order.

An optimizer step takes the next `global_batch_size` examples, sorts them by length and cuts them into micro-batches, which are
assigned to the ranks in turn. The micro-batches are therefore the same for every world size. Epochs follow each other without
a gap, so every step has the same number of examples.
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

BLOCK_SIZE = 1024  # positions whose sources are drawn together; changing it changes the order of resumed runs


class Mixture(NamedTuple):
    """Sources that are sampled by weight.

    Args:
        sizes: number of examples of each source; the sources are concatenated in this order.
        weights: sampling weight of each source; positive.
    """

    sizes: list[int]
    weights: list[float]


def make_mixture(data: str | Sequence[Source], sizes: Sequence[int]) -> Mixture | None:
    """Return the mixture that `data.train` configures, or None if every example is seen once per epoch.

    Args:
        data: value of `data.train`.
        sizes: number of examples of each source.
    """
    weights = [] if isinstance(data, str) else [source.weight for source in data if source.weight is not None]
    return Mixture(list(sizes), weights) if weights else None


class ShuffledSource:
    """Endless sequence of the examples of one source, reshuffled on each pass.

    Args:
        first: index of the source's first example in the training set.
        size: number of its examples.
        seed: seed of the shuffles.
    """

    def __init__(self, first: int, size: int, seed: int) -> None:
        self.first, self.size, self.seed = first, size, seed
        self._epoch, self._permutation = -1, Permutation(1)

    def example(self, position: int) -> int:
        """Return the index of the example at a position (from 0) of the sequence."""
        epoch, index = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, Permutation(self.size, self.seed, epoch)
        return self.first + self._permutation(index)


class TrainingOrder:
    """Assignment of examples to optimizer steps, micro-batches and ranks.

    Args:
        lengths: length of each example, by which the examples of a step are sorted.
        global_batch_size: examples per optimizer step.
        micro_batch_size: examples per forward pass of one rank.
        world_size: number of ranks.
        seed: seed of the shuffles.
        mixture: sources that are sampled by weight; None visits every example once per epoch.
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
        # The prime step keeps the sources' seeds apart; the first source has the seed of the run.
        self._sources = [
            ShuffledSource(first, size, seed + 7919 * i)
            for i, (first, size) in enumerate(zip(starts, sizes, strict=False))
        ]
        self._blocks: list[Tensor] = []  # the source of each position, in blocks of BLOCK_SIZE
        self._draws_before: list[Tensor] = [torch.zeros(len(sizes), dtype=torch.long)]  # per source, before each block

    def step(self, step: int) -> list[int]:
        """Return the examples of optimizer step `step` (from 0) over all ranks, in the global order."""
        first = step * self.global_batch_size
        return [self._example(position) for position in range(first, first + self.global_batch_size)]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """Return the examples of optimizer step `step` (from 0) as the micro-batches of one rank."""
        by_length = sorted(self.step(step), key=lambda example: self.lengths[example])
        size = self.micro_batch_size
        micro_batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        return micro_batches[rank :: self.world_size]

    def _example(self, position: int) -> int:
        if self.mixture is None:
            return self._sources[0].example(position)
        block, offset = divmod(position, BLOCK_SIZE)
        # A resumed run starts at a late position: it repeats the draws of all earlier blocks.
        while len(self._blocks) <= block:
            generator = seeded(self.seed, "mixture", len(self._blocks))
            weights = torch.tensor(self.mixture.weights, dtype=torch.float64)
            drawn = torch.multinomial(weights, BLOCK_SIZE, replacement=True, generator=generator)
            self._blocks.append(drawn)
            self._draws_before.append(self._draws_before[-1] + drawn.bincount(minlength=len(self._sources)))
        source = int(self._blocks[block][offset])
        earlier = int(self._draws_before[block][source]) + int((self._blocks[block][:offset] == source).sum())
        return self._sources[source].example(earlier)


def content_digest(examples: Sequence[Encoded]) -> str:
    """Return a short hash of the contents of a training set."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{len(example.input_ids)} {sum(example.input_ids)} {example.labels}\n".encode())
    return digest.hexdigest()[:16]


def describe_order(
    config: Config, examples: int, contents: str, mixture: Mixture | None = None
) -> dict[str, int | str]:
    """Return everything that the order of the examples depends on; a resumed run must have the same values.

    Args:
        config: config of the run.
        examples: number of training examples.
        contents: hash of the training set.
        mixture: sources that are sampled by weight, if any.
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
    """Pad examples on the right to the length of the longest.

    Args:
        examples: B sequences.
        pad_id: token id of the padding.
        device: device of the result.

    Returns:
        "input_ids" and "attention_mask" (B, S), and "labels" (B, S) for tokens or (B,) for classes.
    """
    width = max(len(e.input_ids) for e in examples)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    batch = {
        "input_ids": [pad(e.input_ids, pad_id) for e in examples],
        "attention_mask": [pad([1] * len(e.input_ids), 0) for e in examples],
        "labels": [e.labels if isinstance(e.labels, int) else pad(e.labels, IGNORED) for e in examples],
    }
    return {name: torch.tensor(value, device=device) for name, value in batch.items()}


def pack(examples: Sequence[Encoded], device: torch.device) -> dict[str, Tensor]:
    """Concatenate examples into one row without padding.

    There is no attention mask: transformers starts a new sequence wherever the position ids restart, and no token attends to
    another sequence.

    Args:
        examples: sequences with token labels, of T tokens in total.
        device: device of the result.

    Returns:
        "input_ids", "position_ids" and "labels" (1, T).
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for example in examples:
        assert isinstance(example.labels, list)  # the config refuses packing for classification
        ids += example.input_ids
        positions += range(len(example.input_ids))
        # The last token of one sequence must not be trained to predict the first token of the next.
        labels += [IGNORED, *example.labels[1:]]
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([values], device=device) for name, values in batch.items()}


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Return the number of tokens that are not padding, as a scalar tensor.

    Args:
        batch: result of `collate` or `pack`.
    """
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).sum()
