"""Tests of `ldmole bench monitor`."""

import pytest

from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.monitor import LEVELS, Sizes, measure, overhead


def test_every_level_of_reporting_is_timed(ranks2: LocalRanks) -> None:
    sizes = Sizes(hidden=72, intermediate=96, layers=1, sequences=2, length=8)
    measured = ranks2.run(measure, sizes, 2)[0]
    assert tuple(measured) == LEVELS and all(len(times) == 2 and min(times) > 0 for times in measured.values())


def test_overhead_uses_differences_within_a_turn() -> None:
    # The machine is half as fast in the second turn.
    measured = dict(silent=[1.0, 2.0, 1.0], plain=[1.01, 2.02, 1.01], detailed=[1.11, 2.22, 1.11])
    assert overhead(measured, 10) == pytest.approx(0.01 + 0.1 / 10)
