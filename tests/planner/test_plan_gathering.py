"""Simulated all-gathers of ZeRO-3 in limits that can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from ldmole_dist.planner.candidates import Candidate, Machine
from ldmole_dist.planner.gathering import gathered_bytes, gathers
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
WORKLOAD = Workload(LLAMA, num_experts=8, lora_rank=4, lambda_hidden=32)
EMBEDDING, NORMS = 300 * 64, (2 * 4 + 1) * 64


def frozen(reuse: int, threshold: int = 0, checkpointing: bool = False) -> tuple[int, int]:
    """Return the elements of frozen weights gathered in a step, and the peak of gathered bytes."""
    zero = (
        ("stage3_max_reuse_distance", reuse),
        ("stage3_prefetch_bucket_size", 0),
        ("stage3_param_persistence_threshold", threshold),
    )
    strategy = Strategy(4, 3, checkpointing=checkpointing, zero=zero)
    (elements,) = (g.elements for g in gathers(WORKLOAD, strategy) if g.kind == "gather")
    return elements, gathered_bytes(WORKLOAD, strategy)


def test_weights_within_reuse_distance_are_kept() -> None:
    total = shapes_of(WORKLOAD).frozen()
    once, all_of_them = frozen(10**9)
    assert once == total  # kept from the forward to the backward
    twice, few = frozen(0)
    # Frozen modules that only read the embedding have no backward: the first norm, and q, k and v of the first layer.
    assert twice == 2 * total - EMBEDDING - 64 - 64 * (64 + 32 + 32)
    assert few < all_of_them


def test_recomputation_gathers_again() -> None:
    total = shapes_of(WORKLOAD).frozen()
    layers = total - 2 * EMBEDDING - 64
    # Nearly all of each layer again: torch stops a recomputation once all saved tensors are there.
    all_again = 2 * total - EMBEDDING + layers
    assert 0.95 * all_again < frozen(0, checkpointing=True)[0] < all_again
    # Weights fetched by a recomputation are released with the layer, at any reuse distance.
    assert total < frozen(10**9, checkpointing=True)[0] < 0.95 * all_again


def test_weights_below_the_threshold_persist() -> None:
    all_, without_norms = frozen(10**9)[0], frozen(10**9, threshold=64)[0]
    assert all_ - without_norms == NORMS


@pytest.mark.parametrize("ranks", [1, 2])
def test_host_traffic_of_offload_is_independent_of_gathers(ranks: int) -> None:
    """A single rank gathers nothing, but still fetches every shard from the host."""
    zero = (("stage3_max_reuse_distance", 10**9), ("stage3_param_persistence_threshold", 0))
    strategy = Strategy(ranks, 3, ep_size=ranks, checkpointing=False, offload="optimizer+params", zero=zero)
    shapes = shapes_of(WORKLOAD)
    trained = shapes.dense() / ranks + shapes.experts() / ranks
    for micro_batches, gradients in ((1, 1), (3, 5)):  # copied out, and from the second one on in again
        candidate = Candidate(
            replace(WORKLOAD, accumulation=micro_batches), strategy, Machine(ranks, 10**9, host_bandwidth=1.0)
        )
        fetched = micro_batches * (2 * shapes.frozen() / ranks + 4 * trained)
        updated = 4 * trained * (gradients + 1 + 7)
        assert candidate.seconds["host"] == pytest.approx((fetched + updated) / 1e9, rel=1e-3)
        assert candidate.seconds["host"] >= candidate.workload.itemsize * shapes.frozen() / ranks / 1e9
        assert (candidate.seconds["wire"] == 0) == (ranks == 1)
