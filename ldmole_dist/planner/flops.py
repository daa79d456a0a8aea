"""Floating-point operations of one rank and optimizer step, in closed form; an (m, k) x (k, n) product counts 2 m k n.

The backward of a frozen linear costs as much as its forward, since its weight has no gradient; that of a trained one costs
twice as much. Attention counts all pairs of positions, as a kernel with a mask computes it.

Shapes: T tokens, D in-features, O out-features, E experts, R LoRA rank, H hidden units of the lambda-MLP.
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
    """Return the FLOPs of one rank and optimizer step, by part.

    Returns:
        base (frozen linears of the decoder layers), attention, head (logits), router, lambda_mlp and experts: Forward and
            backward.
        recompute: Under gradient checkpointing, a second forward of everything except the head.
    """
    check(workload, strategy)
    forward = forward_flops(workload, strategy)
    parts = {part: forward[part] * (1 + BACKWARD[part]) for part in BACKWARD}
    again = sum(forward.values()) - forward["head"] if strategy.checkpointing else 0.0
    return {part: value * workload.accumulation for part, value in (parts | {"recompute": again}).items()}


def forward_flops(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Return the FLOPs of one rank and forward, by the parts of `flops` without "recompute"."""
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
    """Return the elements of the decoder layers' linears and of the head, and the summed width of all attention heads."""
    (one, head), (two, _) = [_linears(workload, layers) for layers in (1, 2)]
    config = workload.backbone
    depth = config.num_hidden_layers
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return one + (two - one) * (depth - 1), head, config.num_attention_heads * head_width * depth


def _linears(workload: Workload, layers: int) -> tuple[int, int]:
    base: Any = meta_model(workload, layers).get_base_model()
    head = base.get_output_embeddings()
    inside = [m for m in base.modules() if type(m) is nn.Linear and m is not head]
    return sum(m.weight.numel() for m in inside), 0 if head is None else int(head.weight.numel())
