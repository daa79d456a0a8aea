"""Predictions against real DeepSpeed engines on real ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.plan_accuracy import Case, Compared, cases, compare, print_table
from ldmole_dist.study.bench.plan_measure import Measured, measure

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


# The one that has most in it: experts spread, both ways of moving, recomputation, several micro-batches, pieces.
QUICK = [c for c in CASES if c.drawn]


@pytest.mark.parametrize("fresh", [2], indirect=True)
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[] if c in QUICK else pytest.mark.full) for c in CASES if c.strategy.ranks == 2],
)
def test_two_ranks(fresh: LocalRanks, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    measured = fresh.run(measure, *case)
    rows = list(compare(case, measured))
    check(rows)
    if case.drawn:  # something moved either way, and not all experts were active
        assert all(m.wire["rows"] and m.wire["weights"] for m in measured)
        assert 1 < measured[0].active < case.workload.num_experts
    print_table(iter(rows))
    printed = capsys.readouterr().out
    assert case.name in printed and "NOT EQUAL" not in printed and "exactly equal" in printed


@pytest.mark.full
@pytest.mark.parametrize("fresh", [4], indirect=True)
@pytest.mark.parametrize("case", [c for c in CASES if c.strategy.ranks == 4], ids=lambda c: c.name)
def test_four_ranks(fresh: LocalRanks, case: Case) -> None:
    check(list(compare(case, fresh.run(measure, *case))))


def test_cases_cover_what_they_should() -> None:
    assert len(CASES) == 9 and len(QUICK) == 1
    assert {c.strategy.stage for c in CASES} == {0, 1, 2, 3}
    assert {c.strategy.ep_size for c in CASES} == {1, 2, 4}
    for values in ("checkpointing", "dispatch"):
        assert len({getattr(c.strategy, values) for c in CASES}) > 1
    assert {c.workload.precision for c in CASES} == {"bf16", "fp32"}


SPREAD = next(c for c in CASES if c.strategy.dispatch == "gather")
PARTS = ("parameters", "gradients", "optimizer", "activations")


def test_a_wrong_prediction_is_seen() -> None:
    wrong = Measured(bytes=dict.fromkeys(PARTS, 10**9), active=2.0)
    rows = list(compare(SPREAD, [wrong]))
    with pytest.raises(AssertionError):
        check(rows)
    with pytest.raises(AssertionError):
        check([row._replace(measured=row.predicted + 1) for row in rows])
    check([row._replace(measured=row.predicted) for row in rows])


def test_what_only_one_side_knows_is_compared() -> None:
    none = Measured(bytes=dict.fromkeys(PARTS, 10**9), active=2.0)
    rows = {row.quantity: row for row in compare(SPREAD, [none])}
    # Predicted, and did not occur.
    for quantity in (
        "weights, elements",
        "weights, bytes sent",
        "all_reduce over 2, elements",
        "all_to_all over 2, calls",
    ):
        assert rows[quantity].predicted > 0 and rows[quantity].measured == 0, quantity
    # Occurred, and is not known.
    other = Measured(bytes=none.bytes, active=2.0)
    other.collectives["broadcast", 2], other.calls["broadcast", 2] = 7, 1
    other.calls["allreduce", 3] = 1
    other.wire["parcels"], other.wire_bytes["parcels"] = 5, 20
    found = {row.quantity: row for row in compare(SPREAD, [other]) if row.quantity not in rows}
    assert {quantity: (row.predicted, row.measured) for quantity, row in found.items()} == {
        "parcels, elements": (0, 5),
        "parcels, bytes sent": (0, 20),
        "broadcast over 2, elements": (0, 7),
        "broadcast over 2, calls": (0, 1),
        "all_reduce over 3, calls": (0, 1),
    }
