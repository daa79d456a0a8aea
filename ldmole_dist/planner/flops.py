"""Floating-point operations (FLOPs) of one rank in an optimizer step, in closed form.

A product of an (m, k) and a (k, n) matrix is counted as 2 m k n FLOPs. The backward of a frozen linear costs as much as its
forward, because its weight has no gradient; the backward of a trained linear costs twice its forward. Attention is counted for
all pairs of positions, because a kernel with a mask computes all of them.

Shape letter: T tokens of a micro-batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

from ldmole_dist.planner.expert_costs import expert_calls
from ldmole_dist.planner.shapes import meta_model, shapes_of
from ldmole_dist.planner.workload import Strategy, Workload, check

PARTS = ("base", "attention", "head", "router", "lambda_mlp", "experts", "recompute")
# FLOPs of the backward relative to the forward.
BACKWARD = {"base": 1.0, "attention": 2.5, "head": 1.0, "router": 2.0, "lambda_mlp": 2.0, "experts": 2.0}


def flops(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Return the FLOPs of one rank in an optimizer step, by part.

    Returns:
        base (frozen linears of the decoder layers), attention, head (logits), router, lambda_mlp and experts: Forward and
            backward.
        recompute: With gradient checkpointing, a second forward of everything except the head.
    """
    check(workload, strategy)
    forward = forward_flops(workload, strategy)
    parts = {part: forward[part] * (1 + BACKWARD[part]) for part in BACKWARD}
    again = sum(forward.values()) - forward["head"] if strategy.checkpointing else 0.0
    return {part: value * workload.accumulation for part, value in (parts | {"recompute": again}).items()}


def forward_flops(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Return the FLOPs of one rank in the forward of a micro-batch, by the parts of `flops` without "recompute"."""
    w, T = workload, workload.tokens
    groups = shapes_of(w).groups
    linears, head, attention_width = _backbone(w)
    return {
        "base": 2.0 * T * linears,
        "attention": 4.0 * T * w.seq * attention_width,
        "head": 2.0 * w.answers * head,
        "router": sum(2.0 * T * group.in_features * w.num_experts * len(group.out_features) for group in groups),
        "lambda_mlp": sum(2.0 * T * (group.in_features + 1) * w.lambda_hidden for group in groups),
        "experts": sum(
            2.0 * call.hidden(w) * (group.in_features + out)
            for group in groups
            for out, call in expert_calls(group, w, strategy)
        ),
    }


@lru_cache(maxsize=32)
def _backbone(workload: Workload) -> tuple[int, int, int]:
    """Return sizes of the whole backbone.

    Returns:
        Weight elements of the linears in all decoder layers; weight elements of the head; width of all attention heads, summed
        over the layers.
    """
    (one, head), (two, _) = [_linears(workload, layers) for layers in (1, 2)]
    config = workload.backbone
    depth = config.num_hidden_layers
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return one + (two - one) * (depth - 1), head, config.num_attention_heads * head_width * depth


def _linears(workload: Workload, layers: int) -> tuple[int, int]:
    """Return the weight elements of a model with `layers` decoder layers: of the linears in the layers, and of the head."""
    base: Any = meta_model(workload, layers).get_base_model()
    head = base.get_output_embeddings()
    inside = [m for m in base.modules() if type(m) is nn.Linear and m is not head]
    return sum(m.weight.numel() for m in inside), 0 if head is None else int(head.weight.numel())
