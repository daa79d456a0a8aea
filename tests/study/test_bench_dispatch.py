"""The dispatch benchmark: every strategy computes the same, and what it counts is what it compares."""

import pytest
import torch

from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.decide import CELLS, decide
from ldmole_dist.study.bench.decide import print_table as print_decisions
from ldmole_dist.study.bench.dispatch import GROUPS, STRATEGIES, Sizes, measure, print_table
from ldmole_dist.study.bench.overlap import measure_overlap, print_overlap


@pytest.mark.parametrize("tokens", [12, 600])  # few tokens: rows are lighter; many: experts are
def test_strategies_agree_and_auto_is_the_lightest(ranks2: LocalRanks, tokens: int) -> None:
    sizes = Sizes(tokens=tokens, features=32, experts=4, rank=8, active=2)
    of_ranks = ranks2.run(measure, sizes, 1, torch.float64)
    measured = of_ranks[0]
    assert tuple(measured) == STRATEGIES
    assert all(m.distance < 1e-12 for of_rank in of_ranks for m in of_rank.values())
    auto = measured["auto"].elements
    assert auto <= min(measured["all_to_all"].elements, measured["gather"].elements) < measured["row per pair"].elements
    assert (auto == measured["gather"].elements) == (tokens == 600)
    # Each rank lends its half of every bank, and gets as many gradients back.
    assert measured["gather"].elements == 2 * 2 * sum(GROUPS) * (4 // 2) * 8 * (32 + 32)


def test_table(ranks2: LocalRanks, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = Sizes(tokens=8, features=16, experts=4, rank=2, active=2)
    print_table({2: ranks2.run(measure, sizes, 1, torch.float32)[0]}, sizes)
    printed = capsys.readouterr().out
    assert all(name in printed for name in STRATEGIES) and "P=2" in printed


def test_overlap_is_measured_in_pairs(ranks2: LocalRanks, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = Sizes(tokens=8, features=16, experts=4, rank=2, active=2)
    measured = ranks2.run(measure_overlap, sizes, "auto", 3, torch.float32)[0]
    assert min(measured) > 0
    print_overlap({(2, "auto"): measured})
    assert "P=2 auto" in capsys.readouterr().out


def test_decisions_are_printed_with_their_cost(capsys: pytest.CaptureFixture[str]) -> None:
    print_decisions([decide(CELLS[0], repeats=2), decide(CELLS[-1])])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + 2 + 1 and "deciding: median" in printed[-1]
