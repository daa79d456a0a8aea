"""Memory of one rank in a training step, by part."""

from __future__ import annotations

import math

from ldmole_dist.planner.activations import activations
from ldmole_dist.planner.expert_costs import saved_bytes, temporary_bytes
from ldmole_dist.planner.gathering import gathered_bytes
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.workload import Strategy, Workload, check
from ldmole_dist.planner.zero import (
    local_elements,
    max_overlapping_elements,
    padded_elements,
    param_groups,
    settings,
    shard_elements,
)

FLOAT = 4  # bytes; trainable parameters, their gradients, master weights and moments are float32 with any precision
PARTS = ("backbone", "experts", "adapter", "gradients", "optimizer", "activations", "working", "gathered", "buckets")
# Peak of the temporary tensors in an update by stage, in multiples of a rank's shard: Adam's roots and quotients, from stage 1
# also the flattened gradient, at stage 3 also the updated parameters. Measured on the CPU with DeepSpeed 0.19.8.
UPDATE_COPIES = (1, 3, 3, 4)


def memory(workload: Workload, strategy: Strategy) -> dict[str, int]:
    """Return the device memory of one rank at the peak of a step, in bytes by part.

    Returns:
        backbone: Frozen weights; at stage 3 this rank's shard (0 if it is offloaded) and the persistent weights.
        experts: A and B of the local experts, sharded likewise at stage 3.
        adapter: Routers and lambda-MLPs, sharded likewise at stage 3; at stages 1 and 2 also the padding of all trainable
            parameters.
        gradients: Gradients of the trainable parameters that this rank holds after a backward.
        optimizer: Adam's moments, and at stages 1 to 3 the float32 master weights; 0 with offload.
        activations: Tensors kept from the forward to the backward.
        working: Peak of the temporary memory beyond `activations`: the maximum over logits and loss, the backward (with
            recomputation) of a decoder layer and, without offload, the update.
        gathered: ZeRO-3's temporarily gathered weights.
        buckets: DeepSpeed's gradient buckets, and at stage 2 the sum of the gradients over micro-batches.

    Raises:
        UserError: If `check` rejects the workload with the strategy, or `meta_model` rejects the workload.
    """
    check(workload, strategy)
    w, s = workload, strategy
    shards, persistent = parameter_bytes(w, s)
    on_host = s.offload == "optimizer+params"
    held = {part: persistent[part] + (0 if on_host else shards[part]) for part in shards}
    updated = _updated_bytes(w, s)
    kept, working = step_activations(w, s)
    if s.offload == "none":
        working = max(working, updated * UPDATE_COPIES[s.stage] - kept)
    sizes = held | {
        "gradients": gradient_bytes(w, s),
        # At stage 0 there are no separate master weights: the optimizer updates the float32 parameters.
        "optimizer": updated * (2 if s.stage == 0 else 3) if s.offload == "none" else 0,
        "activations": kept,
        "working": working,
        "gathered": gathered_bytes(w, s) if s.stage == 3 else 0,
        "buckets": bucket_bytes(w, s),
    }
    return {part: int(sizes[part]) for part in PARTS}


def host_memory(workload: Workload, strategy: Strategy) -> dict[str, int]:
    """Return the host memory that offloading takes on one rank, in bytes by part; empty without offload."""
    w, s = workload, strategy
    if s.offload == "none":
        return {}
    updated = _updated_bytes(w, s)
    # "optimizer": the master weights and two moments, and at stage 2 also a copy of the updated parameters. "gradients": one
    # copy of the rank's shard at stage 2, two at stage 3.
    sizes = {"gradients": updated * (1 if s.stage == 2 else 2), "optimizer": updated * (4 if s.stage == 2 else 3)}
    return sizes if s.stage == 2 else parameter_bytes(w, s)[0] | sizes


def _updated_bytes(workload: Workload, strategy: Strategy) -> int:
    return sum(shard_elements(group, strategy.stage) for group in param_groups(workload, strategy)) * FLOAT


def parameter_bytes(workload: Workload, strategy: Strategy) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of backbone, experts and adapter between two steps, with padding.

    Returns:
        Two dicts, each by part. First: at stage 3 this rank's shards, at the other stages all parameters that the rank holds.
        Second: the persistent weights, which ZeRO-3 keeps unsharded in addition to the shards; 0 at the other stages.
    """
    shards = dict.fromkeys(("backbone", "experts", "adapter"), 0)
    persistent = dict(shards)
    threshold = settings(strategy)["stage3_param_persistence_threshold"]
    for p in shapes_of(workload).parameters:
        part = "experts" if p.expert else "adapter" if p.trainable else "backbone"
        width, n = FLOAT if p.trainable else workload.itemsize, local_elements(p, strategy)
        if strategy.stage == 3:
            ranks = strategy.expert_copies if p.expert and strategy.ep_size > 1 else strategy.ranks
            persistent[part] += n * width if n <= threshold else 0
            n = math.ceil(n / ranks)
        shards[part] += p.quantized_bytes or n * width
    if strategy.stage in (1, 2):
        groups = param_groups(workload, strategy)
        shards["adapter"] += sum(padded_elements(group, 1) - sum(group.elements) for group in groups) * FLOAT
    return shards, persistent


def gradient_bytes(workload: Workload, strategy: Strategy) -> int:
    """Return the bytes of the gradients on the device after a backward, the maximum over the micro-batches of a step."""
    groups, stage = param_groups(workload, strategy), strategy.stage
    if strategy.offload != "none":
        # Stage 2 copies one gradient at a time to the host; stage 3 copies from its bucket.
        return max(n for group in groups for n in group.elements) * FLOAT if stage == 2 else 0
    if stage == 0 or (stage == 1 and workload.accumulation > 1):
        # Stage 0 does not shard gradients, and stage 1 shards them only after the last micro-batch.
        return sum(sum(group.elements) for group in groups) * FLOAT
    return sum(shard_elements(group, 3) if stage == 3 else max_overlapping_elements(group) for group in groups) * FLOAT


def bucket_bytes(workload: Workload, strategy: Strategy) -> int:
    """Return the bytes of DeepSpeed's reduction buckets and, at stage 2 without offload, of the sum over micro-batches."""
    if strategy.stage == 0:
        return 0
    zero = settings(strategy)
    doubled = strategy.stage in (1, 2) and zero["overlap_comm"]
    accumulated = strategy.stage == 2 and strategy.offload == "none" and workload.accumulation > 1
    buckets = zero["reduce_bucket_size"] * FLOAT * (2 if doubled else 1)
    return buckets + (gradient_bytes(workload, strategy) if accumulated else 0)


def step_activations(workload: Workload, strategy: Strategy) -> tuple[int, int]:
    """Return the (activations, working) bytes of forward and backward, without the update; see `memory`."""
    w, s = workload, strategy
    groups = shapes_of(w).groups
    traced = activations(w, s.checkpointing, s.stage == 3)
    saved = sum(saved_bytes(group, w, s) for group in groups)
    temporary = max(temporary_bytes(group, w, s) for group in groups)
    # The backward of a quantized linear first dequantizes its weight to a temporary tensor.
    temporary += max((p.elements for p in shapes_of(w).parameters if p.quantized_bytes), default=0) * w.itemsize
    if not s.checkpointing:
        return int(traced.kept + saved), int(max(traced.loss, traced.working + temporary))
    of_layer = saved / w.backbone.num_hidden_layers
    # Recomputation reuses the recorded support: one byte per token, expert and linear.
    supports = sum(len(group.out_features) for group in groups) * w.tokens * w.num_experts
    return traced.kept + supports, int(max(traced.loss, traced.working + of_layer + temporary))
