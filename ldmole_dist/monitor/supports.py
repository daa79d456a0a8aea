"""Supports (sets of active experts) of tokens, stored as one bit per token and expert."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ldmole_dist.method.routers import Routing


class Supports:
    """Observer (`context.Observer`) that records the support of every real token in every linear."""

    def __init__(self) -> None:
        self._packed: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, routing: Routing, mask_T: Tensor | None) -> None:
        """Record the supports of one forward of the linear `name` (signature of `context.Observer`)."""
        active_TE = routing.p_TE != 0
        if mask_T is not None:
            active_TE = active_TE[mask_T]
        self._packed.setdefault(name, []).append(np.packbits(active_TE.cpu().numpy(), axis=1))

    def changed_from(self, other: Supports) -> dict[str, tuple[int, int]]:
        """Count the tokens whose support differs between two recordings.

        Args:
            other: supports of the same sequences, recorded earlier.

        Returns:
            Name of a linear -> (number of tokens whose support differs, total number of tokens).
        """
        counts = {}
        for name, packed in self._packed.items():
            mine, others = np.concatenate(packed), np.concatenate(other._packed[name])
            counts[name] = int((mine != others).any(axis=1).sum()), len(mine)
        return counts
