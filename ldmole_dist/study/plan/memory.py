"""Memory of one rank in a training step, by part."""

from __future__ import annotations

import math

from ldmole_dist.study.plan.activations import activations
from ldmole_dist.study.plan.gathering import gathered
from ldmole_dist.study.plan.routed import kept, temporaries
from ldmole_dist.study.plan.shapes import shapes_of
from ldmole_dist.study.plan.workload import Strategy, Workload, check
from ldmole_dist.study.plan.zero import local_elements, padded, piece, settings, shards, touched

FLOAT = 4  # bytes: trainable parameters, their gradients, masters and moments in every precision
PARTS = (
    "backbone",
    "experts",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "working",
    "gathered",
    "buckets",
)


def memory(workload: Workload, strategy: Strategy) -> dict[str, int]:
    """Bytes on the device of one rank at the fullest moment of a step, by part.

    Returns:
        backbone: the frozen weights, or this rank's piece of them.
        experts: A and B held here.
        adapter: routers and lambda-MLPs.
        gradients: of the trainable parameters, when all micro-batches are done.
        optimizer: float32 masters, where they are apart from the parameters, and Adam's moments.
        activations: kept from the forward to the backward.
        working: what is held beyond that for a moment: logits and loss, the backward (and the recomputation) of a decoder
            layer, or Adam's intermediates, whichever is most.
        gathered: under ZeRO-3, weights that are whole for the moment.
        buckets: in which DeepSpeed reduces gradients.
    """
    return {part: 0 if part in _hosted(strategy) else size for part, size in everything(workload, strategy).items()}


def host_memory(workload: Workload, strategy: Strategy) -> dict[str, int]:
    """Bytes in host memory that one rank offloads, by part."""
    return {part: size for part, size in everything(workload, strategy).items() if part in _hosted(strategy)}


def _hosted(strategy: Strategy) -> tuple[str, ...]:
    return {
        "none": (),
        "optimizer": ("optimizer",),
        "optimizer+params": ("optimizer", "backbone", "experts", "adapter"),
    }[strategy.offload]


def everything(workload: Workload, strategy: Strategy) -> dict[str, int]:
    """All parts, wherever they are."""
    check(workload, strategy)
    w, s = workload, strategy
    stage = s.stage
    held = parameters(w, s)
    pieces = sum(piece(shard, stage) for shard in shards(w, s))
    # Without partitions the parameters are their own masters; else there are masters too.
    optimizer = pieces * FLOAT * (2 if stage == 0 else 3)
    kept_bytes, working = _activations(w, s)
    update = pieces * FLOAT * (1 if stage == 0 else 2)  # Adam's square roots, and the gradient flattened
    zero = settings(s)
    buckets = 0 if stage == 0 else zero["reduce_bucket_size"] * FLOAT
    if stage in (1, 2) and zero["overlap_comm"]:
        buckets *= 2
    sizes = held | {
        "gradients": gradients(w, s),
        "optimizer": optimizer,
        "activations": kept_bytes,
        "working": max(working, update - kept_bytes),
        "gathered": gathered(w, s) if stage == 3 else 0,
        "buckets": buckets,
    }
    return {part: int(sizes[part]) for part in PARTS}


def parameters(workload: Workload, strategy: Strategy) -> dict[str, int]:
    """Bytes of backbone, experts and adapter between two steps, padding included."""
    sizes = dict.fromkeys(("backbone", "experts", "adapter"), 0)
    threshold = settings(strategy)["stage3_param_persistence_threshold"]
    for p in shapes_of(workload).parameters:
        n = local_elements(p, strategy)
        if strategy.stage == 3:
            ranks = strategy.expert_copies if p.expert and strategy.ep_size > 1 else strategy.ranks
            n = math.ceil(n / ranks) + (n if n <= threshold else 0)  # a small one is also kept whole
        part = "experts" if p.expert else "adapter" if p.trainable else "backbone"
        sizes[part] += n * (FLOAT if p.trainable else workload.itemsize)
    if strategy.stage in (1, 2):
        cut = shards(workload, strategy)
        sizes["adapter"] += sum(padded(shard, 1) - sum(shard.elements) for shard in cut) * FLOAT
    return sizes


def gradients(workload: Workload, strategy: Strategy) -> int:
    """Bytes when all micro-batches are done, before the update."""
    cut = shards(workload, strategy)
    if strategy.stage in (1, 2):
        if strategy.offload == "optimizer":
            return 0
        return sum(touched(shard) for shard in cut) * FLOAT
    return sum(piece(shard, strategy.stage) for shard in cut) * FLOAT


def _activations(workload: Workload, strategy: Strategy) -> tuple[int, int]:
    """(kept, working)."""
    w, s = workload, strategy
    groups = shapes_of(w).groups
    traced = activations(w, s.checkpointing, s.stage == 3)
    of_groups = [kept(group, w, s) for group in groups]
    moment = max(temporaries(group, w, s) for group in groups)
    if not s.checkpointing:
        return int(traced.kept + sum(of_groups)), int(max(traced.loss, traced.working + moment))
    of_layer = sum(of_groups) / w.backbone.num_hidden_layers
    # What the tape remembers: who is active.
    tape = sum(len(group.out_features) for group in groups) * w.tokens * w.num_experts
    return traced.kept + tape, int(max(traced.loss, traced.working + of_layer + moment))
