"""A model of an optimizer step: seconds = sum over terms of (how much of it / a measured rate), fitted by least squares.

The rates are not negative, the errors that are made small are relative ones, and cells that are held out, chosen by their
settings and before the fit, say how far the model can be trusted beyond what it has seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.cells import Cell

Terms = Mapping[str, float]


class Sample(NamedTuple):
    """What a cell consists of, and the seconds that it took."""

    terms: Terms
    seconds: float


class Model(NamedTuple):
    """Seconds for each unit of a term; a term that no sample had any of has no rate, and counts as nothing."""

    seconds_per: dict[str, float]

    def predict(self, terms: Terms) -> float:
        """Seconds of an optimizer step."""
        return sum(seconds * terms[name] for name, seconds in self.seconds_per.items())


class Errors(NamedTuple):
    """Of the predictions for so many cells: median and worst distance from the measured, relative to it."""

    cells: int
    median: float
    worst: float


def fit(samples: Sequence[Sample]) -> Model:
    """Fit the rates.

    Args:
        samples: that may be seen; all with the same terms.

    Raises:
        UserError: where they are no more than the rates: any times could be explained.
    """
    names = [name for name in (samples[0].terms if samples else ()) if any(sample.terms[name] for sample in samples)]
    if len(samples) <= len(names):
        raise UserError(
            f"{len(samples)} cells that are not held out are too few to fit {len(names)} rates: measure more values of an axis"
        )
    amounts = np.array([[sample.terms[name] / sample.seconds for name in names] for sample in samples])
    # Terms differ by ten orders of magnitude; the solver's tolerance is absolute.
    scale = np.linalg.norm(amounts, axis=0)
    solution, _ = nnls(amounts / scale, np.ones(len(samples)))
    return Model(dict(zip(names, (solution / scale).tolist(), strict=True)))


def relative_error(model: Model, sample: Sample) -> float:
    """Of the prediction; above 0 where it is too slow."""
    return model.predict(sample.terms) / sample.seconds - 1


def errors(model: Model, samples: Sequence[Sample]) -> Errors:
    """How well the model predicts these.

    Args:
        model: fitted to others, or to these.
        samples: at least one.
    """
    distances = [abs(relative_error(model, sample)) for sample in samples]
    return Errors(len(distances), statistics.median(distances), max(distances))


def held_out(cells: Sequence[Cell]) -> dict[Cell, str]:
    """The cells that a fit must not see, and why: all with the most ranks, and all with the most experts."""
    reasons: dict[Cell, str] = {}
    for axis in ("ranks", "experts"):
        most = max(getattr(cell, axis) for cell in cells)
        if most > min(getattr(cell, axis) for cell in cells):
            reasons |= {c: f"{axis}={most}" for c in cells if getattr(c, axis) == most and c not in reasons}
    return reasons
