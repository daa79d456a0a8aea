"""ZeRO-3's fetching and releasing, played through: the limits in which it can be told by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from ldmole_dist.planner.choose import Line, Machine
from ldmole_dist.planner.gathering import gathered, gathers
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.workload import Strategy, Workload

LLAMA = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
WORKLOAD = Workload(LLAMA, num_experts=8, rank=4, lambda_hidden=32)
EMBEDDING, NORMS = 300 * 64, (2 * 4 + 1) * 64


def frozen(reuse: int, threshold: int = 0, checkpointing: bool = False) -> tuple[int, int]:
    """(elements of frozen weights gathered in a step, most bytes whole at a time)."""
    zero = (
        ("stage3_max_reuse_distance", reuse),
        ("stage3_prefetch_bucket_size", 0),
        ("stage3_param_persistence_threshold", threshold),
    )
    strategy = Strategy(4, 3, checkpointing=checkpointing, zero=zero)
    (elements,) = (g.elements for g in gathers(WORKLOAD, strategy) if g.kind == "gather")
    return elements, gathered(WORKLOAD, strategy)


def test_what_is_soon_used_again_is_kept() -> None:
    total = shapes_of(WORKLOAD).frozen()
    once, all_of_them = frozen(10**9)
    assert once == total  # from the forward to the backward
    twice, few = frozen(0)
    # The embedding has no backward, nor what reads it alone: the first norm, and q, k and v of the first layer.
    assert twice == 2 * total - EMBEDDING - 64 - 64 * (64 + 32 + 32)
    assert few < all_of_them


def test_a_recomputation_gathers_again() -> None:
    total = shapes_of(WORKLOAD).frozen()
    layers = total - 2 * EMBEDDING - 64
    # Nearly all of a layer once more: torch stops a recomputation when it has what the backward needs.
    all_again = 2 * total - EMBEDDING + layers
    assert 0.95 * all_again < frozen(0, checkpointing=True)[0] < all_again
    # What only a recomputation fetched is released with the layer, however soon it is used again.
    assert total < frozen(10**9, checkpointing=True)[0] < 0.95 * all_again


def test_small_ones_stay_whole() -> None:
    all_, without_norms = frozen(10**9)[0], frozen(10**9, threshold=64)[0]
    assert all_ - without_norms == NORMS


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_offloaded_parameters_move_does_not_depend_on_who_else_gathers(ranks: int) -> None:
    """All experts spread: over a single rank nothing is gathered, and yet every piece comes from the host."""
    zero = (("stage3_max_reuse_distance", 10**9), ("stage3_param_persistence_threshold", 0))
    strategy = Strategy(ranks, 3, ep_size=ranks, checkpointing=False, offload="optimizer+params", zero=zero)
    shapes = shapes_of(WORKLOAD)
    trained = shapes.dense() / ranks + shapes.experts() / ranks
    for micro_batches, gradients in ((1, 1), (3, 5)):  # out, and from the second on in again
        line = Line(replace(WORKLOAD, accumulation=micro_batches), strategy, Machine(ranks, 10**9, host_bandwidth=1.0))
        fetched = micro_batches * (2 * shapes.frozen() / ranks + 4 * trained)
        updated = 4 * trained * (gradients + 1 + 7)
        assert line.seconds["host"] == pytest.approx((fetched + updated) / 1e9, rel=1e-3)
        assert line.seconds["host"] >= line.workload.itemsize * shapes.frozen() / ranks / 1e9
        assert (line.seconds["wire"] == 0) == (ranks == 1)
