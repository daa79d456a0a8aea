"""A model of an optimizer step: seconds = sum over terms of amount x seconds per unit, fitted to the measured cells.

The seconds per unit are fitted by non-negative least squares on relative errors. The cells with the most ranks and with the
most experts are held out before the fit; their errors show how far the model can be trusted when it extrapolates. The planner
computes the amounts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from ldmole_dist.errors import UserError
from ldmole_dist.planner.flops import flops
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.traffic import DISPATCH, bytes_sent, collective_calls
from ldmole_dist.planner.workload import Strategy, Workload
from ldmole_dist.study.scaling.cells import ANSWERS, LAMBDA_HIDDEN, Cell
from ldmole_dist.study.scaling.series import Point

SEEN = "fitted to"
UNITS = {
    "frozen model and recomputation": "FLOP",
    "router, lambda-MLP, experts": "FLOP",
    "sent for experts": "byte",
    "sent by ZeRO": "byte",
    "collectives": "call",
    "decoder layers": "call",
    "trained parameters": "parameter",
    "constant": "step",
}


class Sample(NamedTuple):
    """The amounts of a cell by term, and its measured seconds."""

    terms: Mapping[str, float]
    seconds: float


class ActiveExperts(NamedTuple):
    """Active experts of a token as a power law of the number of experts: factor * E ** power."""

    factor: float
    power: float

    def of(self, experts: int) -> float:
        """Return the active experts of a token, between 1 and all of them."""
        return min(max(self.factor * experts**self.power, 1.0), float(experts))


class Model(NamedTuple):
    """A fitted model.

    Args:
        seconds_per: seconds per unit, by term; terms that are 0 in every fitted cell are missing and count as nothing.
        active: active experts of a token in cells that were not fitted to.
        samples: the samples that were fitted to (SEEN), and those held out, by reason.
    """

    seconds_per: dict[str, float]
    active: ActiveExperts
    samples: dict[str, list[Sample]]

    def predict(self, amounts: Mapping[str, float]) -> float:
        """Return the seconds of an optimizer step with these amounts."""
        return sum(seconds * amounts[name] for name, seconds in self.seconds_per.items())

    def error_rows(self) -> list[dict[str, object]]:
        """Return a table row with the relative errors of the fitted cells, and one for each reason to hold cells out."""
        errors = {
            kind if kind == SEEN else f"held out: {kind}": [
                100 * abs(self.predict(s.terms) / s.seconds - 1) for s in samples
            ]
            for kind, samples in self.samples.items()
        }
        return [
            {
                "cells": kind,
                "number": len(e),
                "median error %": f"{statistics.median(e):.1f}",
                "worst %": f"{max(e):.1f}",
            }
            for kind, e in errors.items()
        ]

    def rate_rows(self) -> list[dict[str, object]]:
        """Return a table row for each term."""
        costs = {name: f"{seconds:.2e}" for name, seconds in self.seconds_per.items()}
        unknown = "unknown: 0 in every fitted cell"
        return [{"term": name, "unit": UNITS[name], "seconds per unit": costs.get(name, unknown)} for name in UNITS]


def terms(cell: Cell, experts_per_token: float, cores: int | None) -> dict[str, float]:
    """Return the amounts of one rank and optimizer step, by the names of UNITS.

    Args:
        cell: the settings.
        experts_per_token: active experts of a token.
        cores: CPU cores that the ranks share, one per rank at most; with more ranks than cores, ranks wait for a core with
            everything that they do, so that every amount counts ranks / cores times. None if each rank has a GPU.
    """
    workload, strategy = planned(cell, experts_per_token, on_cpu=cores is not None)
    compute, sent = flops(workload, strategy), bytes_sent(workload, strategy)
    adapter = sum(compute[part] for part in ("router", "lambda_mlp", "experts"))
    for_experts = sum(number for kind, number in sent.items() if kind in DISPATCH)
    shapes = shapes_of(workload)
    amounts = (
        sum(compute.values()) - adapter,
        adapter,
        for_experts,
        sum(sent.values()) - for_experts,
        sum(collective_calls(workload, strategy).values()),
        float(cell.layers * cell.accumulation),
        shapes.dense() + shapes.experts() / cell.ep_size,
        1.0,
    )
    waiting = max(1.0, cell.ranks / cores) if cores else 1.0
    return {name: waiting * amount for name, amount in zip(UNITS, amounts, strict=True)}


def planned(cell: Cell, experts_per_token: float, on_cpu: bool) -> tuple[Workload, Strategy]:
    """Return the cell as the planner's workload and strategy."""
    workload = Workload(
        cell.backbone(),
        num_experts=cell.experts,
        lora_rank=cell.lora_rank,
        lambda_hidden=LAMBDA_HIDDEN,
        micro_batch=cell.micro_batch,
        accumulation=cell.accumulation,
        seq=cell.seq,
        answer_tokens=ANSWERS,
        active=experts_per_token,
        precision=cell.precision,  # type: ignore[arg-type]  # validated by Cell.checked
        padded=False,
        dropout=0.0,
        on_cpu=on_cpu,
    )
    dispatch = cell.dispatch
    return workload, Strategy(cell.ranks, cell.stage, cell.ep_size, dispatch)  # type: ignore[arg-type]


def fit(samples: Sequence[Sample]) -> dict[str, float]:
    """Fit the seconds per unit of every term that occurs.

    Args:
        samples: samples with the same terms.

    Raises:
        UserError: if there are no more samples than terms, which could explain any times.
    """
    names = [name for name in (samples[0].terms if samples else ()) if any(sample.terms[name] for sample in samples)]
    if len(samples) <= len(names):
        raise UserError(
            f"{len(samples)} cells that are not held out are too few to fit {len(names)} rates; "
            "measure more values of an axis"
        )
    amounts = np.array([[sample.terms[name] / sample.seconds for name in names] for sample in samples])
    # Terms differ by ten orders of magnitude, but the tolerance of nnls is absolute.
    scale = np.linalg.norm(amounts, axis=0)
    solution, _ = nnls(amounts / scale, np.ones(len(samples)))
    return dict(zip(names, (solution / scale).tolist(), strict=True))


def fit_active(points: Sequence[Point]) -> ActiveExperts:
    """Fit the power law by least squares of logarithms; if all points have one E, assume a constant share of E."""
    experts = np.log([float(p.cell.experts) for p in points])
    active = np.log([p.measured.experts_per_token for p in points])
    if len({p.cell.experts for p in points}) == 1:
        return ActiveExperts(float(np.exp(np.mean(active - experts))), 1.0)
    power, constant = np.polyfit(experts, active, 1)
    return ActiveExperts(float(np.exp(constant)), float(power))


def held_out(cells: Sequence[Cell]) -> dict[Cell, str]:
    """Return the cells to hold out with the reason: those with the most ranks, and those with the most experts."""
    reasons: dict[Cell, str] = {}
    for axis in ("ranks", "experts"):
        most = max(getattr(cell, axis) for cell in cells)
        if most > min(getattr(cell, axis) for cell in cells):
            reasons |= {c: f"{axis}={most}" for c in cells if getattr(c, axis) == most and c not in reasons}
    return reasons


def fit_model(points: Sequence[Point], cores: int | None) -> Model:
    """Fit the model to the cells that are not held out.

    Of a held-out cell only the seconds are used, to compare with: its active experts are predicted too.

    Args:
        points: all measured cells.
        cores: CPU cores that the ranks share; None if each rank has a GPU.

    Raises:
        UserError: see `fit`.
    """
    reasons = held_out([point.cell for point in points])
    seen = [point for point in points if point.cell not in reasons]
    samples = {SEEN: [Sample(terms(c, m.experts_per_token, cores), m.seconds) for c, m in seen]}
    seconds_per = fit(samples[SEEN])
    active = fit_active(seen)
    for cell, measured in points:
        if cell in reasons:
            amounts = terms(cell, active.of(cell.experts), cores)
            samples.setdefault(reasons[cell], []).append(Sample(amounts, measured.seconds))
    return Model(seconds_per, active, samples)
