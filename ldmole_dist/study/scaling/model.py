"""Model of the time of an optimizer step, fitted to the measured cells.

seconds = sum over terms of amount x seconds per unit. The terms are the keys of `UNITS`. The planner computes the
amounts; the seconds per unit are fitted by non-negative least squares on relative errors. The cells with the most ranks
and those with the most experts are held out before the fit. The errors on them show how well the model extrapolates.
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
UNITS = {  # name of a term -> unit of its amount
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
    """A cell's amounts and its measured time.

    Args:
        terms: name of a term -> amount in one optimizer step.
        seconds: measured seconds of an optimizer step.
    """

    terms: Mapping[str, float]
    seconds: float


class ActiveExperts(NamedTuple):
    """Mean number of active experts per token as a power law of the number of experts E: factor * E ** power."""

    factor: float
    power: float

    def of(self, experts: int) -> float:
        """Return the mean number of active experts per token for E = `experts`, limited to between 1 and E."""
        return min(max(self.factor * experts**self.power, 1.0), float(experts))


class Model(NamedTuple):
    """A fitted model.

    Args:
        seconds_per: name of a term -> seconds per unit. A term that is 0 in every fitted cell is missing, and `predict`
            ignores it.
        active: power law for the active experts per token of held-out cells.
        samples: `SEEN` -> fitted samples; reason, such as "ranks=8" -> samples held out for it.
    """

    seconds_per: dict[str, float]
    active: ActiveExperts
    samples: dict[str, list[Sample]]

    def predict(self, amounts: Mapping[str, float]) -> float:
        """Return the predicted seconds of an optimizer step.

        Args:
            amounts: name of a term -> amount, as `terms` returns it.
        """
        return sum(seconds * amounts[name] for name, seconds in self.seconds_per.items())

    def error_rows(self) -> list[dict[str, object]]:
        """Return table rows of relative errors: one for the fitted cells, and one per reason for holding cells out."""
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
        """Return one table row per term, with its unit and the fitted seconds per unit."""
        costs = {name: f"{seconds:.2e}" for name, seconds in self.seconds_per.items()}
        unknown = "unknown: 0 in every fitted cell"
        return [{"term": name, "unit": UNITS[name], "seconds per unit": costs.get(name, unknown)} for name in UNITS]


def terms(cell: Cell, experts_per_token: float, cores: int | None) -> dict[str, float]:
    """Return the amount of each term for one rank in one optimizer step.

    If there are more ranks than CPU cores, ranks wait for a core, and all amounts are multiplied by ranks / cores.

    Args:
        cell: configuration.
        experts_per_token: mean number of active experts per token.
        cores: number of CPU cores that the ranks share; a rank uses one core at most. None if each rank has a GPU.

    Returns:
        Name of a term (key of `UNITS`) -> amount.
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
    """Convert a cell to the planner's workload and strategy.

    Args:
        cell: configuration.
        experts_per_token: mean number of active experts per token.
        on_cpu: whether the ranks compute on a CPU.
    """
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
    """Fit the seconds per unit of every term that is not 0 in all samples.

    Args:
        samples: samples with the same terms.

    Returns:
        Name of a term -> seconds per unit, at least 0.

    Raises:
        UserError: if there are not more samples than terms to fit, because such a fit could match any measured times.
    """
    names = [name for name in (samples[0].terms if samples else ()) if any(sample.terms[name] for sample in samples)]
    if len(samples) <= len(names):
        raise UserError(
            f"{len(samples)} measured configurations are left to fit the model, without those with the most ranks or experts, "
            f"which test it; more than {len(names)} are needed, one per term; measure more, such as --layers 2,4,8 --hidden "
            "128,256,512"
        )
    amounts = np.array([[sample.terms[name] / sample.seconds for name in names] for sample in samples])
    # Scale the columns: amounts differ by ten orders of magnitude between terms, and nnls has an absolute tolerance.
    scale = np.linalg.norm(amounts, axis=0)
    solution, _ = nnls(amounts / scale, np.ones(len(samples)))
    return dict(zip(names, (solution / scale).tolist(), strict=True))


def fit_active(points: Sequence[Point]) -> ActiveExperts:
    """Fit the power law by least squares of the logarithms; if all points have the same E, set the power to 1."""
    experts = np.log([float(p.cell.experts) for p in points])
    active = np.log([p.measured.experts_per_token for p in points])
    if len({p.cell.experts for p in points}) == 1:
        return ActiveExperts(float(np.exp(np.mean(active - experts))), 1.0)
    power, constant = np.polyfit(experts, active, 1)
    return ActiveExperts(float(np.exp(constant)), float(power))


def held_out(cells: Sequence[Cell]) -> dict[Cell, str]:
    """Return the cells to hold out: those with the most ranks, and those with the most experts.

    An axis with one value holds out no cell.

    Returns:
        Cell -> reason, such as "ranks=8".
    """
    reasons: dict[Cell, str] = {}
    for axis in ("ranks", "experts"):
        most = max(getattr(cell, axis) for cell in cells)
        if most > min(getattr(cell, axis) for cell in cells):
            reasons |= {c: f"{axis}={most}" for c in cells if getattr(c, axis) == most and c not in reasons}
    return reasons


def fit_model(points: Sequence[Point], cores: int | None) -> Model:
    """Fit the model to the cells that are not held out.

    The measured active experts per token of a held-out cell are not used: they are predicted by the power law, so that
    the errors on held-out cells are those of a real prediction.

    Args:
        points: all measured cells.
        cores: number of CPU cores that the ranks share; None if each rank has a GPU.

    Raises:
        UserError: if there are too few cells to fit, see `fit`.
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
