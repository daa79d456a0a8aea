"""The checkpoint benchmark trains, saves and measures."""

import pytest

from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.checkpoint import Sizes, measure, print_measured


def test_measures_a_run_that_saves(ranks1: LocalRanks, capsys: pytest.CaptureFixture[str]) -> None:
    measured = ranks1.run(measure, Sizes(hidden=64, layers=1, experts=4, rank=2), 2)[0]
    # Masters and two moments, in float32.
    assert measured.bytes > 12 * measured.parameters > 0
    assert 0 < measured.stall < measured.save
    print_measured(measured)
    assert "training waits" in capsys.readouterr().out
