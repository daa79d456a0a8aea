"""Tests of `ldmole bench dispatch` and `ldmole bench decide`."""

import pytest
import torch

from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench import decide
from ldmole_dist.study.bench.dispatch import GROUPS, STRATEGIES, Sizes, measure, measure_overlap


@pytest.mark.parametrize(
    "tokens", [12, 600]
)  # with few tokens rows are smaller than experts, with many they are larger
def test_strategies_agree_and_auto_sends_least(ranks2: LocalRanks, tokens: int) -> None:
    sizes = Sizes(tokens=tokens, features=32, experts=4, lora_rank=8, active=2)
    of_ranks = ranks2.run(measure, sizes, 1, torch.float64)
    assert [row["strategy"] for row in of_ranks[0]] == list(STRATEGIES)
    assert all(row["distance"] < 1e-12 for rows in of_ranks for row in rows)
    sent = {row["strategy"]: row["elements sent"] for row in of_ranks[0]}
    assert sent["auto"] <= min(sent["all_to_all"], sent["gather"]) < sent["row per pair"]
    assert (sent["auto"] == sent["gather"]) == (tokens == 600)
    # Each rank sends its half of every bank, and receives as many gradients.
    assert sent["gather"] == 2 * 2 * sum(GROUPS) * (4 // 2) * 8 * (32 + 32)
    assert of_ranks[0][0]["x faster"] == of_ranks[0][0]["x fewer elements"] == 1.0


def test_overlap_is_timed_in_every_mode(ranks2: LocalRanks) -> None:
    sizes = Sizes(tokens=8, features=16, experts=4, lora_rank=2, active=2)
    rows = ranks2.run(measure_overlap, sizes, 3, torch.float32)[0]
    assert [row["mode"] for row in rows] == ["all_to_all", "auto"]
    assert all(row["overlapped ms"] > 0 and row["after ms"] > 0 and row["x faster"] > 0 for row in rows)


def test_decisions_are_printed_with_their_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decide, "CELLS", [decide.CELLS[0], decide.CELLS[-1]])
    decide.main(2)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 4 + 1 and "deciding: median" in printed[-1]
