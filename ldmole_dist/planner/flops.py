"""Floating-point operations of one rank and optimizer step, by part: closed forms; (m, k) times (k, n) is 2 m k n.

A frozen linear has no gradient of its weight: its backward costs as much as its forward, where a trained one costs twice.
Attention is counted over all pairs of positions, as a kernel with a mask computes it.

Shapes: T tokens, D in-features, O out-features, E experts, R LoRA rank, H units of the lambda-MLP.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

from ldmole_dist.planner.routed import work
from ldmole_dist.planner.shapes import meta_model, shapes_of
from ldmole_dist.planner.workload import Strategy, Workload, check

PARTS = ("base", "attention", "head", "router", "lambda_mlp", "experts", "recompute")


def flops(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Of one rank and optimizer step.

    Returns:
        base (frozen linears of the decoder layers), attention, head (logits), router, lambda_mlp, experts: forward and
        backward; recompute: the forward of everything but the head once more, under gradient checkpointing.
    """
    check(workload, strategy)
    forward = forward_flops(workload, strategy)
    backward = {"base": 1.0, "attention": 2.5, "head": 1.0, "router": 2.0, "lambda_mlp": 2.0, "experts": 2.0}
    parts = {part: forward[part] * (1 + backward[part]) for part in backward}
    again = sum(forward.values()) - forward["head"] if strategy.checkpointing else 0.0
    return {part: value * workload.accumulation for part, value in (parts | {"recompute": again}).items()}


def forward_flops(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Of one rank and forward: the parts of `flops` but "recompute"."""
    w, T = workload, workload.tokens
    groups = shapes_of(w).groups
    linears = [(group.in_features, out) for group in groups for out in group.out_features]
    layers, head, heads_width = _backbone(w)
    return {
        "base": 2.0 * T * layers,
        "attention": 4.0 * T * w.seq * heads_width,
        "head": 2.0 * w.answers * head,
        "router": sum(2.0 * T * D * w.num_experts for D, _ in linears),
        "lambda_mlp": sum(2.0 * T * (group.in_features + 1) * w.lambda_hidden for group in groups),
        "experts": sum(
            2.0 * call.columns(w) * (group.in_features + out)
            for group in groups
            for out, call in work(group, w, strategy)
        ),
    }


@lru_cache(maxsize=32)
def _backbone(workload: Workload) -> tuple[int, int, int]:
    """Elements of the linears in decoder layers, of the head, and width of all attention heads in all layers."""
    one, two = [_linears(workload, layers) for layers in (1, 2)]
    config = workload.backbone
    depth = config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return one[0] + (two[0] - one[0]) * (depth - 1), one[1], config.num_attention_heads * width * depth


def _linears(workload: Workload, layers: int) -> tuple[int, int]:
    base: Any = meta_model(workload, layers).get_base_model()
    head = base.get_output_embeddings()
    inside = [m for m in base.modules() if type(m) is nn.Linear and m is not head]
    return sum(m.weight.numel() for m in inside), 0 if head is None else int(head.weight.numel())
