"""Estimates compared with real DeepSpeed engines on real ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.plan import Case, Compared, cases, compare, summary
from ldmole_dist.study.bench.plan_measure import Measured, measure

MAX_ERROR = 0.05  # relative, in bytes
CASES = cases()


def check(rows: list[Compared]) -> None:
    in_bytes = [row for row in rows if row.quantity.endswith("bytes")]
    assert len(in_bytes) == 4
    for row in in_bytes:
        assert row.measured > 100_000, "too small: overheads would dominate"
        assert abs(row.error) < MAX_ERROR, row
    exact = [row for row in rows if row not in in_bytes]
    assert exact and all(abs(row.predicted - row.measured) < 1e-6 for row in exact), exact
    assert any(row.measured for row in exact)


@pytest.fixture(scope="module")
def fresh(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    """Ranks that never created a ZeRO-3 engine, since DeepSpeed then replaces torch's linear for the whole process."""
    with LocalRanks(request.param, timeout=290) as ranks:
        yield ranks


# The case that covers most: distributed experts, both ways of dispatch, recomputation, micro-batches, shards.
QUICK = [c for c in CASES if c.routing_dependent]


@pytest.mark.parametrize("fresh", [2], indirect=True)
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[] if c in QUICK else pytest.mark.full) for c in CASES if c.strategy.ranks == 2],
)
def test_estimates_match_two_ranks(fresh: LocalRanks, case: Case) -> None:
    measured = fresh.run(measure, *case)
    rows = list(compare(case, measured))
    check(rows)
    if case.routing_dependent:  # rows and experts were sent, and routing was sparse
        assert all(m.wire["rows"] and m.wire["weights"] for m in measured)
        assert 1 < measured[0].active < case.workload.num_experts
    assert [row["quantity"] for row in summary(rows)][:4] == [f"{part}, bytes" for part in PARTS]
    assert summary(rows)[4:] == [
        {
            "case": case.name,
            "quantity": f"{len(rows) - 4} counts of elements, bytes sent and calls",
            "predicted": "",
            "measured": "",
            "error": "exact",
        }
    ]


@pytest.mark.full
@pytest.mark.parametrize("fresh", [4], indirect=True)
@pytest.mark.parametrize("case", [c for c in CASES if c.strategy.ranks == 4], ids=lambda c: c.name)
def test_estimates_match_four_ranks(fresh: LocalRanks, case: Case) -> None:
    check(list(compare(case, fresh.run(measure, *case))))


def test_cases_cover_all_stages_and_settings() -> None:
    assert len(CASES) == 9 and len(QUICK) == 1
    assert {c.strategy.stage for c in CASES} == {0, 1, 2, 3}
    assert {c.strategy.ep_size for c in CASES} == {1, 2, 4}
    for values in ("checkpointing", "dispatch"):
        assert len({getattr(c.strategy, values) for c in CASES}) > 1
    assert {c.workload.precision for c in CASES} == {"bf16", "fp32"}


GATHER = next(c for c in CASES if c.strategy.dispatch == "gather")
PARTS = ("parameters", "gradients", "optimizer", "activations")


def test_check_fails_for_wrong_estimates() -> None:
    wrong = Measured(bytes=dict.fromkeys(PARTS, 10**9), active=2.0)
    rows = list(compare(GATHER, [wrong]))
    with pytest.raises(AssertionError):
        check(rows)
    with pytest.raises(AssertionError):
        check([row._replace(measured=row.predicted + 1) for row in rows])
    check([row._replace(measured=row.predicted) for row in rows])


def test_quantities_of_one_side_are_compared_with_zero() -> None:
    none = Measured(bytes=dict.fromkeys(PARTS, 10**9), active=2.0)
    rows = {row.quantity: row for row in compare(GATHER, [none])}
    # Estimated, but not measured.
    for quantity in (
        "weights, elements",
        "weights, bytes sent",
        "all_reduce over 2, elements",
        "all_to_all over 2, calls",
    ):
        assert rows[quantity].predicted > 0 and rows[quantity].measured == 0, quantity
    # Measured, but not estimated.
    other = Measured(bytes=none.bytes, active=2.0)
    other.collectives["broadcast", 2], other.calls["broadcast", 2] = 7, 1
    other.calls["allreduce", 3] = 1
    other.wire["unknown"], other.wire_bytes["unknown"] = 5, 20
    found = {row.quantity: row for row in compare(GATHER, [other]) if row.quantity not in rows}
    assert {quantity: (row.predicted, row.measured) for quantity, row in found.items()} == {
        "unknown, elements": (0, 5),
        "unknown, bytes sent": (0, 20),
        "broadcast over 2, elements": (0, 7),
        "broadcast over 2, calls": (0, 1),
        "all_reduce over 3, calls": (0, 1),
    }
