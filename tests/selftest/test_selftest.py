"""The selftest: its list of cases, and the table that counts failed cases."""

import math

import pytest

from ldmole_dist.selftest import run
from ldmole_dist.selftest.run import Case, list_cases, selftest


def close(distance: float) -> dict[str, float]:
    return {"a": 0.0, "base_model.b.default": distance}


def broken() -> dict[str, float]:
    raise ValueError("unknown collective")


def test_cases_cover_every_stage_and_ep_size() -> None:
    found = list_cases(4)
    details = [(case.name, *case.args) for case in found]
    assert {a for a in details if a[0] == "updates"} == {
        ("updates", "llama", f"zero{s}", p, True) for s in range(4) for p in (1, 2, 4)
    } | {("updates", "qwen3", "zero3", 4, True)}
    assert len([a for a in details if a[0] == "gradients"]) == 2 * 3 * 2 + 2
    assert {a for a in details if a[0] == "replay"} == {("replay", p) for p in (1, 2, 4)}
    partitioned = [case for case in found if case.name == "updates" and case.args[:2] == ("llama", "zero3")]
    assert all(case.settings == {"stage3_param_persistence_threshold": 0} for case in partitioned) and partitioned
    assert {case.args for case in list_cases(1) if case.name == "replay"} == {(1,)}
    assert {case.args for case in list_cases(6) if case.name == "replay"} == {(1,), (2,)}  # 3 does not divide 8 experts


def test_failed_cases_are_counted_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    all_cases = [
        Case("first", "within", 1e-3, close, (1e-4,)),
        Case("second", "beyond", 1e-3, close, (2e-3,)),
        Case("third", "error", 1e-3, broken),
        Case("fourth", "NaN", 1e-3, close, (math.nan,)),
        Case("fifth", "after an error", 0.0, close, (0.0,)),
    ]
    monkeypatch.setattr(run, "list_cases", lambda size: all_cases)
    lines: list[str] = []
    assert not selftest(2, lines.append)
    assert len(lines) == 7
    verdicts = [" ok " in line for line in lines[1:6]]
    assert verdicts == [True, False, False, False, True] and [" FAIL " in line for line in lines[1:6]] == [
        not ok for ok in verdicts
    ]
    assert lines[2].endswith("  b") and "2.0e-03" in lines[2]
    assert lines[3].endswith("ValueError: unknown collective")
    assert lines[6].startswith("selftest: 3 of 5 cases failed; 2 ranks on ") and "deepspeed 0." in lines[6]


def test_two_ranks_pass() -> None:
    """All cases of `ldmole selftest --ranks 2` except parity, which has its own tests."""
    lines: list[str] = []
    quick = [case for case in list_cases(2) if case.name not in ("gradients", "updates")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "list_cases", lambda size: quick)
        assert selftest(2, lines.append), "\n".join(lines)
    assert {case.name for case in quick} == {"ranks", "collectives", "replay", "dtypes"}
