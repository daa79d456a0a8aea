"""The model of this study: fitted to the cells it may see, tried on those held out, carried on to more ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.active import ActiveExperts, fit_active
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
        active: experts of a token in every cell that the model was not fitted to.
        active_held_out: what they were in the cells held out, mean by E; nothing is predicted from it.
    """

    model: Model
    samples: dict[str, list[Sample]]
    cores: int | None
    active: ActiveExperts
    active_held_out: dict[int, float]

    def errors(self) -> dict[str, Errors]:
        """By the keys of `samples`."""
        return {kind: errors(self.model, samples) for kind, samples in self.samples.items()}

    def lines(self) -> list[str]:
        """The errors, to print."""
        return [
            f"model, {'held out: ' * (kind != SEEN)}{kind}: {e.cells} cells, median error {e.median:.1%}, worst {e.worst:.1%}"
            for kind, e in self.errors().items()
        ]

    def unseen(self) -> list[str]:
        """Terms that no fitted cell had any of: they have no rate and count as nothing."""
        return [name for name in UNITS if name not in self.model.seconds_per]

    def seconds(self, cell: Cell, cores: int | None) -> float:
        """Of an optimizer step of a cell that was not measured, on ranks that share `cores`."""
        return self.model.predict(terms(cell, self.active.of(cell.experts), cores))

    def outlook(self, base: Cell, ranks: Iterable[int] = (8, 16, 32, 64)) -> list[Cell]:
        """Weak scaling beyond this machine: experts on every rank, and spread as widely as they can be."""
        return [
            replace(base, ranks=n, ep_size=ep) for n in ranks for ep in dict.fromkeys((1, math.gcd(n, base.experts)))
        ]


def predict(points: Sequence[Point], cores: int | None) -> Prediction | str:
    """Fit, or say why that cannot be done.

    Of a cell that is held out only the seconds are taken, to compare with: how many experts its tokens activate is
    predicted like the rest.

    Args:
        points: all cells that were measured.
        cores: that the ranks share; None where each has a GPU.
    """
    reasons = held_out([point.cell for point in points])
    seen = [point for point in points if point.cell not in reasons]
    held = [point for point in points if point.cell in reasons]
    samples = {SEEN: [Sample(terms(c, m.experts_per_token, cores), m.seconds) for c, m in seen]}
    try:
        model = fit(samples[SEEN])
    except UserError as error:
        return str(error)
    active = fit_active(seen)
    active_held_out: dict[int, list[float]] = {}
    for cell, measured in held:
        amounts = terms(cell, active.of(cell.experts), cores)
        samples.setdefault(reasons[cell], []).append(Sample(amounts, measured.seconds))
        active_held_out.setdefault(cell.experts, []).append(measured.experts_per_token)
    means = {experts: statistics.mean(values) for experts, values in sorted(active_held_out.items())}
    return Prediction(model, samples, cores, active, means)


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
