"""Memory of one rank in a training step, by part."""

from __future__ import annotations

import math

from ldmole_dist.planner.activations import activations
from ldmole_dist.planner.gathering import gathered
from ldmole_dist.planner.routed import kept, temporaries
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.workload import Strategy, Workload, check
from ldmole_dist.planner.zero import local_elements, padded, piece, settings, shards, touched

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
# Copies of a rank's piece that an update makes for a moment: Adam's roots and quotients, from stage 1 on the gradient in one
# piece, at stage 3 the updated parameters. Measured on the CPU.
UPDATE = (1, 3, 3, 4)


def memory(workload: Workload, strategy: Strategy) -> dict[str, int]:
    """Bytes on the device of one rank at the fullest moment of a step, by part.

    Returns:
        backbone: the frozen weights, or this rank's piece of them.
        experts: A and B held here.
        adapter: routers and lambda-MLPs.
        gradients: of the trainable parameters, when a backward is over.
        optimizer: float32 masters, where they are apart from the parameters, and Adam's moments.
        activations: kept from the forward to the backward.
        working: what is held beyond that for a moment: logits and loss, the backward (and the recomputation) of a decoder
            layer, or the update of the parameters, whichever is most.
        gathered: under ZeRO-3, weights that are whole for the moment.
        buckets: in which DeepSpeed reduces gradients.
    """
    check(workload, strategy)
    w, s = workload, strategy
    pieces, whole = parameters(w, s)
    hosts_pieces = s.offload == "optimizer+params"
    held = {part: whole[part] + (0 if hosts_pieces else pieces[part]) for part in pieces}
    updated = sum(piece(shard, s.stage) for shard in shards(w, s)) * FLOAT
    kept_bytes, working = step_activations(w, s)
    if s.offload == "none":
        working = max(working, updated * UPDATE[s.stage] - kept_bytes)
    sizes = held | {
        "gradients": gradients(w, s),
        # At stage 0 the parameters are their own masters.
        "optimizer": updated * (2 if s.stage == 0 else 3) if s.offload == "none" else 0,
        "activations": kept_bytes,
        "working": working,
        "gathered": gathered(w, s) if s.stage == 3 else 0,
        "buckets": buckets(w, s),
    }
    return {part: int(sizes[part]) for part in PARTS}


def host_memory(workload: Workload, strategy: Strategy) -> dict[str, int]:
    """Bytes in host memory of one rank that offloads, by part."""
    w, s = workload, strategy
    if s.offload == "none":
        return {}
    updated = sum(piece(shard, s.stage) for shard in shards(w, s)) * FLOAT
    # Stage 2 has a copy of the updated parameters there, stage 3 one of the gradients.
    sizes = {"gradients": updated * (1 if s.stage == 2 else 2), "optimizer": updated * (4 if s.stage == 2 else 3)}
    return sizes if s.stage == 2 else parameters(w, s)[0] | sizes


def parameters(workload: Workload, strategy: Strategy) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of backbone, experts and adapter between two steps, padding included: what a rank holds for itself, and what
    ZeRO-3 keeps whole besides."""
    pieces = dict.fromkeys(("backbone", "experts", "adapter"), 0)
    whole = dict(pieces)
    threshold = settings(strategy)["stage3_param_persistence_threshold"]
    for p in shapes_of(workload).parameters:
        part = "experts" if p.expert else "adapter" if p.trainable else "backbone"
        width, n = FLOAT if p.trainable else workload.itemsize, local_elements(p, strategy)
        if strategy.stage == 3:
            ranks = strategy.expert_copies if p.expert and strategy.ep_size > 1 else strategy.ranks
            whole[part] += n * width if n <= threshold else 0
            n = math.ceil(n / ranks)
        pieces[part] += n * width
    if strategy.stage in (1, 2):
        cut = shards(workload, strategy)
        pieces["adapter"] += sum(padded(shard, 1) - sum(shard.elements) for shard in cut) * FLOAT
    return pieces, whole


def gradients(workload: Workload, strategy: Strategy) -> int:
    """Bytes when a backward is over; of the micro-batch after which they are most."""
    cut, stage = shards(workload, strategy), strategy.stage
    if strategy.offload != "none":
        # One parameter's at a time on its way to the host.
        return max(n for shard in cut for n in shard.elements) * FLOAT if stage == 2 else 0
    if stage == 0 or (stage == 1 and workload.accumulation > 1):
        return sum(sum(shard.elements) for shard in cut) * FLOAT  # stage 1 cuts them after the last micro-batch
    return sum(piece(shard, 3) if stage == 3 else touched(shard) for shard in cut) * FLOAT


def buckets(workload: Workload, strategy: Strategy) -> int:
    """Bytes of what DeepSpeed reduces gradients in, and from the second micro-batch on of what it adds up."""
    if strategy.stage == 0:
        return 0
    zero = settings(strategy)
    doubled = strategy.stage in (1, 2) and zero["overlap_comm"]
    added = strategy.stage == 2 and strategy.offload == "none" and workload.accumulation > 1
    return zero["reduce_bucket_size"] * FLOAT * (2 if doubled else 1) + (gradients(workload, strategy) if added else 0)


def step_activations(workload: Workload, strategy: Strategy) -> tuple[int, int]:
    """(kept, working) bytes of forward and backward: see `memory`; the update is not among them."""
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
