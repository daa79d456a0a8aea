"""How many experts of E a token activates, as far as the cells that a fit may see say it: k = factor * E ** power."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldmole_dist.study.scaling.series import Point


class ActiveExperts(NamedTuple):
    """A power of E: a line where both are drawn on logarithmic scales."""

    factor: float
    power: float

    def of(self, experts: int) -> float:
        """Active experts of a token, between 1 and all of them."""
        return min(max(self.factor * experts**self.power, 1.0), float(experts))

    def __str__(self) -> str:
        return f"{self.factor:.2f} * E ** {self.power:.2f}"


def fit_active(points: Sequence[Point]) -> ActiveExperts:
    """The line of least squares; cells of one E tell only a share of E.

    Args:
        points: that may be seen, at least one.
    """
    experts = np.log([float(p.cell.experts) for p in points])
    active = np.log([p.measured.experts_per_token for p in points])
    if len({p.cell.experts for p in points}) == 1:
        return ActiveExperts(float(np.exp(np.mean(active - experts))), 1.0)
    power, constant = np.polyfit(experts, active, 1)
    return ActiveExperts(float(np.exp(constant)), float(power))
