"""Predictions against real DeepSpeed engines on real ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ldmole_dist.ranks import LocalRanks
from ldmole_dist.study.plan.accuracy import Case, Compared, cases, compare, print_table
from ldmole_dist.study.plan.measure import Measured, measure

BYTES = 0.05
CASES = cases()


def check(rows: list[Compared]) -> None:
    in_bytes = [row for row in rows if row.quantity.endswith("bytes")]
    assert len(in_bytes) == 4
    for row in in_bytes:
        assert row.measured > 100_000, "too little to be told from overheads"
        assert abs(row.error) < BYTES, row
    exact = [row for row in rows if row not in in_bytes]
    assert exact and all(abs(row.predicted - row.measured) < 1e-6 for row in exact), exact
    assert any(row.measured for row in exact)


@pytest.fixture(scope="module")
def fresh(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    """Ranks in which no engine of ZeRO-3 was made: DeepSpeed leaves a linear behind there that keeps its input."""
    with LocalRanks(request.param, timeout=290) as ranks:
        yield ranks


@pytest.mark.parametrize("fresh", [2], indirect=True)
@pytest.mark.parametrize("case", [c for c in CASES if c.strategy.ranks == 2], ids=lambda c: c.name)
def test_two_ranks(fresh: LocalRanks, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(compare(case, fresh.run(measure, *case)))
    check(rows)
    print_table(iter(rows))
    printed = capsys.readouterr().out
    assert case.name in printed and "NOT EQUAL" not in printed and "exactly equal" in printed


@pytest.mark.full
@pytest.mark.parametrize("fresh", [4], indirect=True)
@pytest.mark.parametrize("case", [c for c in CASES if c.strategy.ranks == 4], ids=lambda c: c.name)
def test_four_ranks(fresh: LocalRanks, case: Case) -> None:
    check(list(compare(case, fresh.run(measure, *case))))


def test_cases_cover_what_they_should() -> None:
    assert len(CASES) == 8
    assert {c.strategy.stage for c in CASES} == {0, 1, 2, 3}
    assert {c.strategy.ep_size for c in CASES} == {1, 2, 4}
    for values in ("checkpointing", "dispatch"):
        assert len({getattr(c.strategy, values) for c in CASES}) > 1
    assert {c.workload.precision for c in CASES} == {"bf16", "fp32"}


def test_a_wrong_prediction_is_seen() -> None:
    case = CASES[0]
    wrong = Measured(bytes=dict.fromkeys(("parameters", "gradients", "optimizer", "activations"), 10**9), active=2.0)
    wrong.collectives["allreduce", 2] = wrong.calls["allreduce", 2] = 1
    rows = list(compare(case, [wrong]))
    with pytest.raises(AssertionError):
        check(rows)
    with pytest.raises(AssertionError):
        check([row._replace(measured=row.predicted + 1) for row in rows])
