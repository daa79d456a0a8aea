"""Tests of the scaling study's model: known rates are recovered, and held-out cells do not affect the fit."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ldmole_dist.errors import UserError
from ldmole_dist.study.scaling.cells import Cell
from ldmole_dist.study.scaling.model import SEEN, UNITS, Model, Sample, fit, fit_active, fit_model, held_out, terms
from ldmole_dist.study.scaling.series import Point
from ldmole_dist.study.scaling.store import Store
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
    points = [Point(cell, measured(sample.seconds, experts_per_token=5.9)) for cell, sample in planned_samples(rates)]
    model = fit_model(points, cores=2)
    for name, seconds_per in rates.items():
        assert model.seconds_per[name] == pytest.approx(seconds_per, rel=1e-3), name
    assert {row["worst %"] for row in model.error_rows() if row["cells"] != "held out: experts=64"} == {"0.0"}


def test_a_rate_is_never_negative() -> None:
    samples = [Sample({"a": a, "b": b}, 2 * a - 0.5 * b) for a, b in ((1.0, 1.0), (2.0, 1.0), (3.0, 4.0), (4.0, 1.0))]
    assert min(fit(samples).values()) == 0.0


def test_held_out_cells_do_not_affect_the_fit() -> None:
    rates = dict(zip(UNITS, (2e-11, 5e-11, 1e-9, 5e-10, 2e-4, 4e-3, 2e-8, 0.03), strict=True))
    samples = planned_samples(rates, noise=0.05)
    reasons = held_out([cell for cell, _ in samples])
    assert set(reasons.values()) == {"ranks=4", "experts=64"}
    assert all(cell in reasons for cell, _ in samples if cell.ranks == 4 or cell.experts == 64)

    def fitted(factor: float, active: float = 5.9) -> Model:
        points = []
        for cell, sample in samples:
            unseen = cell in reasons
            values = measured(sample.seconds * (factor if unseen else 1.0), experts_per_token=active if unseen else 5.9)
            points.append(Point(cell, values))
        return fit_model(points, cores=2)

    def errors(model: Model) -> dict[str, tuple[float, float]]:
        return {row["cells"]: (float(row["median error %"]), float(row["worst %"])) for row in model.error_rows()}

    plain, doubled, other_routing = fitted(1.0), fitted(2.0), fitted(1.0, active=1.5)
    assert other_routing == plain
    assert plain.seconds_per == doubled.seconds_per and errors(plain)[SEEN] == errors(doubled)[SEEN]
    for kind in ("held out: ranks=4", "held out: experts=64"):
        assert errors(plain)[kind][1] < 20 and errors(doubled)[kind][0] == pytest.approx(50, abs=10)


def test_active_experts_follow_a_power_law() -> None:
    def points(*active: tuple[int, float]) -> list[Point]:
        return [Point(replace(GRID.base, experts=e), measured(1.0, experts_per_token=k)) for e, k in active]

    power = fit_active(points((4, 3.0), (16, 6.0), (64, 12.0)))
    assert [power.of(e) for e in (8, 256)] == pytest.approx([3 * 2**0.5, 24.0]) and power.of(1) == 1.0
    share = fit_active(points((8, 5.0), (8, 7.2)))
    assert share.of(8) == pytest.approx(6.0) and share.of(64) == pytest.approx(48.0)
    assert fit_active(points((4, 1.0), (16, 16.0))).of(2) == 1.0  # at least one expert


def test_fit_needs_more_cells_than_rates() -> None:
    with pytest.raises(UserError, match="1 measured configurations are left to fit"):
        fit_model([Point(TINY, measured(1.0))], cores=2)
    with pytest.raises(UserError, match="0 measured configurations are left to fit"):
        points = [Point(replace(TINY, ranks=2), measured(1.0)), Point(replace(TINY, experts=8), measured(1.0))]
        fit_model(points, cores=2)
    samples = [Sample({"a": 1.0, "b": float(n), "none": 0.0}, 1.0 + n) for n in range(3)]
    with pytest.raises(UserError, match="2 measured configurations are left to fit the model, .* more than 2 are needed"):
        fit(samples[:2])
    model = Model(fit(samples), fit_active([Point(TINY, measured(1.0))]), {SEEN: samples})
    assert model.seconds_per == pytest.approx({"a": 1.0, "b": 1.0})  # a term that is always 0 has no rate
    assert model.predict({"a": 2.0, "b": 1.0, "none": 5.0}) == pytest.approx(3.0)


def test_amounts_grow_with_ranks_per_core() -> None:
    cell = replace(GRID.base, ranks=4, ep_size=4)
    own, shared = terms(cell, 5.9, None), terms(cell, 5.9, 2)
    assert all(shared[name] == 2 * own[name] for name in UNITS)
    assert terms(cell, 5.9, 4) == terms(cell, 5.9, 8) == own


def test_planned_elements_equal_the_counted_ones() -> None:
    from ldmole_dist.planner.traffic import elements_sent
    from ldmole_dist.study.scaling.model import planned

    gathers = [row for row in Store(RECORDED, None).rows() if row.cell.dispatch == "gather" and row.measured]
    assert gathers
    for row in gathers:
        assert row.measured is not None
        counted, expected = (
            row.measured.wire,
            elements_sent(*planned(row.cell, row.measured.experts_per_token, on_cpu=True)),
        )
        assert {k: n for k, n in counted.items() if n} == {k: n for k, n in expected.items() if k in counted and n}
