"""Gaussian noise on the router's scores while training, so that experts that lose narrowly are tried too.

The paper routes without noise; this is an exploration beside it, off by default. What is drawn depends only on the key (seed,
step, micro-batch, rank) and the name of the linear: a recomputed forward, and a run that goes on, draw the same again.

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
        key: what tells this micro-batch from every other of the run.
    """

    std: float
    key: tuple[int, ...]

    def added(self, logits_TE: Tensor, name: str) -> Tensor:
        """(T, E): the scores of the linear `name` with noise on them; its gradient is that of the scores."""
        generator = torch.Generator(logits_TE.device).manual_seed(stream(*self.key, name))
        drawn = torch.randn(logits_TE.shape, generator=generator, dtype=logits_TE.dtype, device=logits_TE.device)
        return logits_TE + self.std * drawn


def linear_decay(start: float, share: float, step: int, steps: int) -> float:
    """A value that falls linearly from `start` at step 1 to 0 after `share` of all steps.

    Args:
        start: value at the first step.
        share: of `steps`, above 0.
        step: from 1.
        steps: of the whole run.
    """
    return start * max(0.0, 1 - (step - 1) / (share * steps))


def stream(*names: object) -> int:
    """A seed that depends on the names alone: not on process, device or order of creation."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "little")
