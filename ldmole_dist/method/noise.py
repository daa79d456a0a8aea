"""Gaussian noise on router scores during training, so that experts with slightly lower scores are tried too.

Not in the paper, and off by default. On devices of one type, the noise depends only on the key (seed, step, micro-batch, rank),
the name of the linear, and the shape and dtype of its scores, so a recomputed forward and a resumed run draw the same values.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class RouterNoise(NamedTuple):
    """The noise of one micro-batch.

    Args:
        std: standard deviation, in units of the scores u.
        key: integers that identify this micro-batch and rank within the run.
    """

    std: float
    key: tuple[int, ...]

    def add_to(self, logits_TE: Tensor, name: str) -> Tensor:
        """Return the scores (T, E) of the linear `name` plus noise, which carries no gradient."""
        generator = torch.Generator(logits_TE.device).manual_seed(seed_from(*self.key, name))
        drawn = torch.randn(logits_TE.shape, generator=generator, dtype=logits_TE.dtype, device=logits_TE.device)
        return logits_TE + self.std * drawn


def linear_decay(start: float, share: float, step: int, steps: int) -> float:
    """Return the value at `step` of a linear decay from `start` at step 1 to 0 after the fraction `share` of all steps.

    Args:
        start: value at the first step.
        share: fraction of `steps` after which the value is 0; above 0.
        step: current step, counted from 1.
        steps: number of steps of the run.
    """
    return start * max(0.0, 1 - (step - 1) / (share * steps))


def seed_from(*names: object) -> int:
    """Return a 64-bit seed that depends only on `names`, not on process, device or creation order."""
    # Not hash(): Python salts the hashes of strings differently in each process.
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "little")
