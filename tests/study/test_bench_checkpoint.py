"""Tests of `ldmole bench checkpoint`."""

from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.checkpoint import Sizes, measure


def test_sizes_and_stall_of_a_small_run(ranks1: LocalRanks) -> None:
    measured = ranks1.run(measure, Sizes(hidden=64, layers=1, experts=4, lora_rank=2), 2)[0]
    # A checkpoint has the float32 masters and both moments.
    assert 1e6 * measured["checkpoint MB"] > 12 * measured["trainable parameters"] > 0
    assert 0 < measured["training waits, % of the save"] < 100
