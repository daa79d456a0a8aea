"""The model of this study: fitted to the cells it may see, tried on those held out, carried on to more ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.cells import Cell
from ldmole_dist.study.scaling.fit import Errors, Model, Sample, errors, fit, held_out
from ldmole_dist.study.scaling.series import Point
from ldmole_dist.study.scaling.terms import UNITS, terms

SEEN = "fitted to"


class Prediction(NamedTuple):
    """A fitted model and what it was fitted to and tried on.

    Args:
        model: seconds for each unit of a term.
        samples: by SEEN, and by the reason for which cells were held out.
        cores: that ranks share here; None where each has a GPU.
        experts_per_token: median of the cells, for cells that were not measured.
    """

    model: Model
    samples: dict[str, list[Sample]]
    cores: int | None
    experts_per_token: float

    def errors(self) -> dict[str, Errors]:
        """By the keys of `samples`."""
        return {kind: errors(self.model, samples) for kind, samples in self.samples.items()}

    def lines(self) -> list[str]:
        """The errors, to print."""
        return [
            f"model, {'held out: ' * (kind != SEEN)}{kind}: {e.cells} cells, median error {e.median:.1%}, worst {e.worst:.1%}"
            for kind, e in self.errors().items()
        ]

    def seconds(self, cell: Cell, cores: int | None) -> float:
        """Of an optimizer step of a cell that was not measured, on ranks that share `cores`."""
        return self.model.predict(terms(cell, min(self.experts_per_token, cell.experts), cores))

    def outlook(self, base: Cell, ranks: Iterable[int] = (8, 16, 32, 64)) -> list[Cell]:
        """Weak scaling beyond this machine: experts on every rank, and spread as widely as they can be."""
        return [
            replace(base, ranks=n, ep_size=ep) for n in ranks for ep in dict.fromkeys((1, math.gcd(n, base.experts)))
        ]


def predict(points: Sequence[Point], cores: int | None) -> Prediction | str:
    """Fit, or say why that cannot be done.

    Args:
        points: all cells that were measured.
        cores: that the ranks share; None where each has a GPU.
    """
    reasons = held_out([point.cell for point in points])
    samples: dict[str, list[Sample]] = {SEEN: []}
    for cell, measured in points:
        amounts = terms(cell, measured.experts_per_token, cores)
        samples.setdefault(reasons.get(cell, SEEN), []).append(Sample(amounts, measured.seconds))
    try:
        model = fit(samples[SEEN])
    except UserError as error:
        return str(error)
    active = sorted(measured.experts_per_token for _, measured in points)
    return Prediction(model, samples, cores, active[len(active) // 2])


def rate(term: str, seconds_per: float) -> str:
    """A fitted rate in units that can be read."""
    if seconds_per == 0:
        return "costs nothing that could be told from the other terms"
    unit = UNITS[term]
    if unit in ("FLOP", "byte"):
        return f"{1e-9 / seconds_per:.3g} {'GFLOP' if unit == 'FLOP' else 'GB'}/s"
    units = ((1e3, "ms"), (1e6, "µs"), (1e9, "ns"), (1e12, "ps"))
    scale, name = next((u for u in units if seconds_per * u[0] >= 1), units[-1])
    return f"{scale * seconds_per:.3g} {name} for each {unit}"
