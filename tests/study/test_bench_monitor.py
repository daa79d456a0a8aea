"""The benchmark of monitoring trains, reports and compares."""

import pytest

from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.monitor import Measured, Sizes, measure, print_measured


def test_measures_all_kinds_of_steps(ranks2: LocalRanks, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = Sizes(hidden=72, intermediate=96, layers=1, sequences=2, length=8)
    measured = ranks2.run(measure, sizes, 2)[0]
    assert all(len(times) == 2 and min(times) > 0 for times in measured)
    print_measured(measured, sizes, 2, 10)
    assert "with a detailed report every 10 steps" in capsys.readouterr().out


def test_the_overhead_is_of_differences_within_a_turn() -> None:
    # The machine is twice as slow in the second turn, for all alike.
    measured = Measured(silent=[1.0, 2.0, 1.0], plain=[1.01, 2.02, 1.01], detailed=[1.11, 2.22, 1.11])
    assert measured.overhead(10) == pytest.approx(0.01 + 0.1 / 10)
