"""The rules by which DeepSpeed 0.19.8 cuts trainable parameters into pieces and reduces their gradients, by ZeRO stage.

It sees float32 parameters in every precision. Experts are cut over the ranks that hold the same ones, the rest over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ldmole_dist.engine.ds_config import load_ds_config
from ldmole_dist.planner.shapes import Parameter, shapes_of
from ldmole_dist.planner.workload import Strategy, Workload

# DeepSpeed's own values where a config says nothing.
DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "overlap_comm": False,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
STAGE0_BUCKET = 500_000_000


class Shard(NamedTuple):
    """Parameters that are cut over the same `ranks`, by their elements on a rank that holds them whole."""

    elements: tuple[int, ...]
    ranks: int


def settings(strategy: Strategy) -> dict[str, Any]:
    """zero_optimization of the shipped config, with what it leaves to DeepSpeed."""
    found: dict[str, Any] = dict(DEFAULTS)
    if strategy.stage == 3:
        found["overlap_comm"] = True  # unless the config says otherwise
    return found | load_ds_config(strategy.deepspeed)["zero_optimization"] | dict(strategy.zero)


def local_elements(parameter: Parameter, strategy: Strategy) -> int:
    """Of a parameter on one rank, before ZeRO cuts it."""
    return parameter.elements // strategy.ep_size if parameter.expert else parameter.elements


def shards(workload: Workload, strategy: Strategy) -> list[Shard]:
    """The trainable parameters by the ranks that they are cut over: dense ones, then experts if they are spread."""
    trainable = [p for p in shapes_of(workload).parameters if p.trainable]
    apart = strategy.ep_size > 1
    dense = tuple(p.elements for p in trainable if not (apart and p.expert))
    experts = tuple(local_elements(p, strategy) for p in trainable if apart and p.expert)
    found = [Shard(dense, strategy.ranks), Shard(experts, strategy.expert_copies)]
    return [shard for shard in found if shard.elements]


def padded(shard: Shard, stage: int) -> int:
    """Elements of all pieces together: stages 1 and 2 pad the whole to an even number for each rank, stage 3 each parameter."""
    if stage == 3:
        return sum(math.ceil(n / shard.ranks) for n in shard.elements) * shard.ranks
    return math.ceil(sum(shard.elements) / (2 * shard.ranks)) * 2 * shard.ranks


def piece(shard: Shard, stage: int) -> int:
    """Elements that one rank updates."""
    return sum(shard.elements) if stage == 0 else padded(shard, stage) // shard.ranks


def touched(shard: Shard) -> int:
    """At stages 1 and 2: elements of the parameters that lie, if only in part, in the piece of the rank where they are most;
    their gradients are kept whole."""
    size = padded(shard, 1) // shard.ranks
    sums = [0] * shard.ranks
    start = 0
    for n in shard.elements:
        for rank in range(start // size, (start + n - 1) // size + 1):
            sums[rank] += n
        start += n
    return max(sums)


def flushes(elements: Sequence[int], bucket: int) -> int:
    """Buckets that a backward fills: parameters in the order of their gradients, the last first."""
    number, filled = 0, 0
    for n in reversed(elements):
        if filled and filled + n > bucket:
            number, filled = number + 1, 0
        filled += n
    return number + (filled > 0)
