"""Sharding of trainable parameters and bucketing of their gradients in DeepSpeed 0.19.8, by ZeRO stage.

The trainable parameters are float32 with any precision. Experts are sharded over the ranks that hold the same experts, and
all other parameters over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ldmole_dist.engine.ds_config import load_ds_config
from ldmole_dist.planner.shapes import Parameter, shapes_of
from ldmole_dist.planner.workload import Strategy, Workload

# DeepSpeed's defaults for settings that a config does not contain.
DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "overlap_comm": False,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
STAGE0_BUCKET = 500_000_000  # elements; without ZeRO, DeepSpeed ignores `reduce_bucket_size`


class ParamGroup(NamedTuple):
    """Trainable parameters that are sharded over the same group of ranks.

    Args:
        elements: Number of elements of each parameter before sharding.
        ranks: Number of ranks in the group.
    """

    elements: tuple[int, ...]
    ranks: int


def settings(strategy: Strategy) -> dict[str, Any]:
    """Return the `zero_optimization` section that DeepSpeed uses.

    This is the section of the shipped config with the overrides of `Strategy.zero`, completed with DeepSpeed's defaults.
    """
    defaults = DEFAULTS | {"overlap_comm": strategy.stage == 3}  # stage 3 enables it unless the config disables it
    return defaults | load_ds_config(strategy.deepspeed)["zero_optimization"] | dict(strategy.zero)


def local_elements(parameter: Parameter, strategy: Strategy) -> int:
    """Return the number of elements of a parameter on one rank, before ZeRO shards it."""
    return parameter.elements // strategy.ep_size if parameter.expert else parameter.elements


def param_groups(workload: Workload, strategy: Strategy) -> list[ParamGroup]:
    """Return the groups of trainable parameters.

    Without expert parallelism there is one group; with it, routers and lambda-MLPs form one group, and experts another.
    """
    trainable = [p for p in shapes_of(workload).parameters if p.trainable]
    separate = strategy.ep_size > 1
    dense = tuple(p.elements for p in trainable if not (separate and p.expert))
    experts = tuple(local_elements(p, strategy) for p in trainable if separate and p.expert)
    groups = [ParamGroup(dense, strategy.ranks), ParamGroup(experts, strategy.expert_copies)]
    return [group for group in groups if group.elements]


def padded_elements(group: ParamGroup, stage: int) -> int:
    """Return the number of elements of all shards together, including padding.

    Stages 1 and 2 pad the flattened group to an even number of elements per rank; stage 3 pads each parameter.
    """
    if stage == 3:
        return sum(math.ceil(n / group.ranks) for n in group.elements) * group.ranks
    return math.ceil(sum(group.elements) / (2 * group.ranks)) * 2 * group.ranks


def shard_elements(group: ParamGroup, stage: int) -> int:
    """Return the number of elements that one rank updates, including padding."""
    return sum(group.elements) if stage == 0 else padded_elements(group, stage) // group.ranks


def max_overlapping_elements(group: ParamGroup) -> int:
    """Return the total size, in elements, of the parameters that overlap one rank's shard; the maximum over the ranks.

    At stages 1 and 2, a rank keeps the complete gradients of the parameters that overlap its shard.
    """
    size = shard_elements(group, 1)
    sums = [0] * group.ranks
    start = 0
    for n in group.elements:
        for rank in range(start // size, (start + n - 1) // size + 1):
            sums[rank] += n
        start += n
    return max(sums)


def bucket_flushes(elements: Sequence[int], bucket: int) -> int:
    """Return the number of times that a backward flushes its gradient bucket.

    Args:
        elements: Number of elements of each parameter; the gradients arrive in reverse order.
        bucket: Capacity of the bucket, in elements.
    """
    flushes, filled = 0, 0
    for n in reversed(elements):
        if filled and filled + n > bucket:
            flushes, filled = flushes + 1, 0
        filled += n
    return flushes + (filled > 0)
