"""The model of the scaling study is fitted to what it may see, and tried on what it has not."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.active import ActiveExperts, fit_active
from ldmole_dist.study.scaling.cells import Cell
from ldmole_dist.study.scaling.fit import Model, Sample, errors, fit, held_out
from ldmole_dist.study.scaling.prediction import SEEN, Prediction, predict, rate
from ldmole_dist.study.scaling.series import Point
from ldmole_dist.study.scaling.store import Store
from ldmole_dist.study.scaling.terms import UNITS, terms
from tests.study.scaling_rows import GRID, RECORDED, TINY, measured


@cache
def terms_of_grid() -> list[tuple[Cell, dict[str, float]]]:
    return [(cell, terms(cell, 5.9, cores=2)) for cell in GRID.cells()]


def planned_samples(rates: dict[str, float], noise: float = 0.0) -> list[tuple[Cell, Sample]]:
    random = np.random.default_rng(0)
    return [
        (cell, Sample(t, sum(rates[k] * v for k, v in t.items()) * random.uniform(1 - noise, 1 + noise)))
        for cell, t in terms_of_grid()
    ]


def test_known_rates_are_recovered() -> None:
    known = (2e-11, 5e-11, 1e-9, 5e-10, 2e-4, 4e-3, 2e-8, 0.03)
    rates = dict(zip(UNITS, known, strict=True))
    samples = planned_samples(rates)
    reasons = held_out([cell for cell, _ in samples])
    model = fit([sample for cell, sample in samples if cell not in reasons])
    for name, seconds_per in rates.items():
        assert model.seconds_per[name] == pytest.approx(seconds_per, rel=1e-3), name
    assert errors(model, [sample for cell, sample in samples if cell in reasons]).worst < 1e-3


def test_a_rate_is_never_negative() -> None:
    samples = [Sample({"a": a, "b": b}, 2 * a - 0.5 * b) for a, b in ((1.0, 1.0), (2.0, 1.0), (3.0, 4.0), (4.0, 1.0))]
    assert min(fit(samples).seconds_per.values()) == 0.0


def test_the_fit_does_not_see_what_is_held_out() -> None:
    rates = dict(zip(UNITS, (2e-11, 5e-11, 1e-9, 5e-10, 2e-4, 4e-3, 2e-8, 0.03), strict=True))
    samples = planned_samples(rates, noise=0.05)
    reasons = held_out([cell for cell, _ in samples])
    assert set(reasons.values()) == {"ranks=4", "experts=64"}
    assert all(cell in reasons for cell, _ in samples if cell.ranks == 4 or cell.experts == 64)

    def prediction(factor: float, active: float = 5.9) -> Any:
        points = []
        for cell, sample in samples:
            unseen = cell in reasons
            values = measured(sample.seconds * (factor if unseen else 1.0), experts_per_token=active if unseen else 5.9)
            points.append(Point(cell, values))
        return predict(points, cores=2)

    plain, doubled, routed_otherwise = prediction(1.0), prediction(2.0), prediction(1.0, active=1.5)
    assert routed_otherwise.samples == plain.samples and routed_otherwise.model == plain.model
    assert routed_otherwise.active_held_out == {8: 1.5, 64: 1.5}  # shown beside what was taken for it
    assert plain.model == doubled.model
    assert plain.errors()[SEEN] == doubled.errors()[SEEN]
    for kind in ("ranks=4", "experts=64"):
        assert plain.errors()[kind].worst < 0.2 and doubled.errors()[kind].median == pytest.approx(0.5, abs=0.1)
        assert any(f"held out: {kind}" in line for line in plain.lines())


def test_active_experts_are_carried_on_from_the_fitted_cells() -> None:
    def points(*active: tuple[int, float]) -> list[Point]:
        return [Point(replace(GRID.base, experts=e), measured(1.0, experts_per_token=k)) for e, k in active]

    power = fit_active(points((4, 3.0), (16, 6.0), (64, 12.0)))
    assert [power.of(e) for e in (8, 256)] == pytest.approx([3 * 2**0.5, 24.0]) and power.of(1) == 1.0
    share = fit_active(points((8, 5.0), (8, 7.2)))
    assert share.of(8) == pytest.approx(6.0) and share.of(64) == pytest.approx(48.0)
    assert fit_active(points((4, 1.0), (16, 16.0))).of(2) == 1.0  # not below one


def test_no_more_cells_than_rates_are_no_model() -> None:
    assert "1 cells that are not held out are too few" in str(predict([Point(TINY, measured(1.0))], cores=2))
    assert "0 cells that are not held out" in str(
        predict([Point(replace(TINY, ranks=2), measured(1.0)), Point(replace(TINY, experts=8), measured(1.0))], cores=2)
    )
    samples = [Sample({"a": 1.0, "b": float(n), "none": 0.0}, 1.0 + n) for n in range(3)]
    with pytest.raises(UserError, match="2 cells .* are too few to fit 2 rates"):
        fit(samples[:2])
    assert fit(samples).seconds_per == pytest.approx({"a": 1.0, "b": 1.0})  # what none of them has gets no rate
    assert fit(samples).predict({"a": 2.0, "b": 1.0, "none": 5.0}) == pytest.approx(3.0)


def test_a_rate_can_be_read_however_small() -> None:
    assert rate("trained parameters", 1e-11) == "10 ps for each parameter"
    assert rate("trained parameters", 1e-14) == "0.01 ps for each parameter"
    assert rate("constant", 0.03) == "30 ms for each step" and rate("sent by ZeRO", 5e-10) == "2 GB/s"


@pytest.mark.parametrize(("experts", "spread"), [(12, [4, 4, 4, 4]), (8, [8, 8, 8, 8]), (64, [8, 16, 32, 64]), (1, [])])
def test_the_outlook_can_be_planned_with_any_number_of_experts(experts: int, spread: list[int]) -> None:
    base = replace(GRID.base, experts=experts, ep_size=1)
    fitted = Prediction(Model(dict.fromkeys(UNITS, 1e-9)), {}, 2, ActiveExperts(1.7, 0.6), {})
    cells = fitted.outlook(base)
    assert len(set(cells)) == len(cells) and [c.ep_size for c in cells if c.ep_size > 1] == spread
    assert all(fitted.seconds(cell, None) > 0 for cell in cells)


def test_ranks_that_share_cores_take_longer_by_as_much() -> None:
    cell = replace(GRID.base, ranks=4, ep_size=4)
    apart, crowded = terms(cell, 5.9, None), terms(cell, 5.9, 2)
    assert all(crowded[name] == 2 * apart[name] for name in UNITS)
    assert terms(cell, 5.9, 4) == terms(cell, 5.9, 8) == apart


def test_the_planners_elements_are_those_that_were_counted() -> None:
    from ldmole_dist.planner.traffic import elements_sent
    from ldmole_dist.study.scaling.terms import planned

    gathers = [row for row in Store(RECORDED, None).rows() if row.cell.dispatch == "gather" and row.measured]
    assert gathers
    for row in gathers:
        assert row.measured is not None
        counted, expected = (
            row.measured.wire,
            elements_sent(*planned(row.cell, row.measured.experts_per_token, on_cpu=True)),
        )
        assert {k: n for k, n in counted.items() if n} == {k: n for k, n in expected.items() if k in counted and n}
