"""One order of the examples for all ranks, cut into optimizer steps and micro-batches.

The sequence of examples depends on seed, file and epoch only. An optimizer step takes the next `global_batch_size` of it
whatever the number of ranks, sorts them by length and cuts them into micro-batches of like length, which are dealt out to the
ranks in turn: the micro-batches, too, are the same for any number of ranks. Epochs follow each other without a gap: no step is
short.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ldmole_dist.config import Config
from ldmole_dist.data.encode import Encoded
from ldmole_dist.objective import IGNORED


class TrainingOrder:
    """Which examples each rank sees at each optimizer step.

    Args:
        lengths: tokens of each example.
        global_batch_size: examples of an optimizer step.
        micro_batch_size: examples of one forward on one rank.
        world_size: number of ranks.
        seed: of the shuffles.
    """

    def __init__(
        self, lengths: Sequence[int], global_batch_size: int, micro_batch_size: int, world_size: int, seed: int
    ) -> None:
        self.lengths, self.seed = lengths, seed
        self.global_batch_size, self.micro_batch_size, self.world_size = global_batch_size, micro_batch_size, world_size
        self._epoch, self._permutation = -1, torch.empty(0)

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
        epoch, index = divmod(position, len(self.lengths))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.lengths), generator=generator)
        return int(self._permutation[index])


def describe_order(config: Config, examples: Sequence[Encoded]) -> dict[str, int | str]:
    """What the order of the examples depends on: who goes on with a run must have all of it as it was."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{len(example.input_ids)} {sum(example.input_ids)} {example.labels}\n".encode())
    return {
        "global_batch_size": config.optimisation.global_batch_size,
        "seed": config.run.seed,
        "examples": len(examples),
        "contents": digest.hexdigest()[:16],
    }


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
