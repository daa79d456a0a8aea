"""Global order of the training examples, and collation into batches of tensors.

Training reads an endless sequence of examples, which depends only on the seed, the data and the source weights. Without
weights, each epoch is a new permutation of all examples. With weights, a random source is drawn for each position of the
sequence; each source yields its own examples, in a new permutation on every pass.

An optimizer step takes the next `global_batch_size` examples, sorts them by length and cuts them into micro-batches, which are
assigned to the ranks in turn. The micro-batches are therefore the same for every world size. A step may contain the end of one
epoch and the start of the next, so every step has the same number of examples.

Shapes: B examples of a micro-batch, S tokens of the longest of them, T tokens of all of them.
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

BLOCK_SIZE = 1024  # positions whose sources are drawn in one call; changing it changes the order of resumed runs


class Mixture(NamedTuple):
    """Sizes and weights of sources that are sampled by weight.

    Args:
        sizes: number of examples of each source; the training set concatenates the sources in this order.
        weights: positive sampling weight of each source, relative to those of the others.
    """

    sizes: list[int]
    weights: list[float]


def make_mixture(data: str | Sequence[Source], sizes: Sequence[int]) -> Mixture | None:
    """Return the mixture that `data.train` configures, or None if no source has a weight.

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
        size: number of examples of the source.
        seed: seed of the shuffles.
    """

    def __init__(self, first: int, size: int, seed: int) -> None:
        self.first, self.size, self.seed = first, size, seed
        self._epoch, self._permutation = -1, Permutation(1)

    def example(self, position: int) -> int:
        """Return the training-set index of the example at `position` (from 0) of the sequence."""
        epoch, index = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, Permutation(self.size, self.seed, epoch)
        return self.first + self._permutation(index)


class TrainingOrder:
    """Assignment of examples to optimizer steps, micro-batches and ranks.

    Args:
        lengths: length of each example, in tokens or bytes; the examples of a step are sorted by it.
        global_batch_size: examples per optimizer step.
        micro_batch_size: examples per forward pass of one rank.
        world_size: number of ranks.
        seed: seed of the shuffles.
        mixture: sources that are sampled by weight; None if every example is seen once per epoch.
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
        # Each source has a seed of its own, so that sources of equal size are shuffled differently.
        self._sources = [
            ShuffledSource(first, size, seed + 7919 * i)
            for i, (first, size) in enumerate(zip(starts, sizes, strict=False))
        ]
        self._blocks: list[Tensor] = []  # index of the source of each position, by block
        # By block: number of draws of each source in earlier blocks.
        self._draws_before: list[Tensor] = [torch.zeros(len(sizes), dtype=torch.long)]

    def step(self, step: int) -> list[int]:
        """Return the indices of the examples of optimizer step `step` (from 0), over all ranks."""
        first = step * self.global_batch_size
        return [self._example(position) for position in range(first, first + self.global_batch_size)]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """Return the micro-batches of one rank in optimizer step `step` (from 0), each as a list of example indices."""
        by_length = sorted(self.step(step), key=lambda example: self.lengths[example])
        size = self.micro_batch_size
        micro_batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        return micro_batches[rank :: self.world_size]

    def _example(self, position: int) -> int:
        if self.mixture is None:
            return self._sources[0].example(position)
        block, offset = divmod(position, BLOCK_SIZE)
        # Draw every block up to this one, because the next example of a source depends on how often the source was drawn in
        # earlier blocks. A resumed run therefore repeats the draws of the steps before its checkpoint.
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
    """Return a hash of a training set; it covers the labels and the number and sum of the token ids of each example."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{len(example.input_ids)} {sum(example.input_ids)} {example.labels}\n".encode())
    return digest.hexdigest()[:16]


def describe_order(
    config: Config, examples: int, contents: str, mixture: Mixture | None = None
) -> dict[str, int | str]:
    """Return the values that determine the order of the examples; a resumed run must have the same values.

    Args:
        config: config of the run.
        examples: number of training examples.
        contents: hash of the training set (`content_digest`, or `StreamedRows.digest`).
        mixture: sources that are sampled by weight; None if every example is seen once per epoch.
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
        examples: B examples.
        pad_id: token id of the padding.
        device: device of the result.

    Returns:
        "input_ids" (B, S), "attention_mask" (B, S) with 0 for padding, and "labels": (B, S) with -100 for padding, or (B,)
        class indices for sequence classification.
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

    The batch has no attention mask. transformers starts a new sequence wherever the position ids restart from 0, and a token
    attends only to its own sequence.

    Args:
        examples: examples with token labels.
        device: device of the result.

    Returns:
        "input_ids", "position_ids" and "labels", each (1, T).
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for example in examples:
        assert isinstance(example.labels, list)  # the config rejects packing for classification
        ids += example.input_ids
        positions += range(len(example.input_ids))
        # The last token of one sequence must not be trained to predict the first token of the next.
        labels += [IGNORED, *example.labels[1:]]
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([values], device=device) for name, values in batch.items()}


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Return the number of tokens of a batch that are not padding, as a scalar tensor.

    Args:
        batch: return value of `collate` or `pack`.
    """
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).sum()
