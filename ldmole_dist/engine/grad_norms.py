"""Gradient norms of the adapter's parts, just before the optimizer steps.

Every ZeRO stage keeps reduced gradients somewhere else; each rank squares what it holds, and one all-reduce of a few numbers
gives the norms. The places are DeepSpeed 0.19.8's own; a test holds the parts to the norm that the engine reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.build import Engine
from ldmole_dist.tuner.state_dict import is_expert_tensor

MARKS = {"lora_A": "experts_A", "lora_B": "experts_B", "router": "router", "lambda_mlp": "lambda_mlp"}
PARTS = (*MARKS.values(), "head")


def gradient_norms(engine: Engine) -> dict[str, float]:
    """Norms before clipping, by part; every rank calls it, at an accumulation boundary after the backward.

    Returns:
        For each of `PARTS` the norm over the parameters of all ranks and linears; "head" is what is trained in full.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    squares = dict.fromkeys(PARTS, torch.zeros((), dtype=torch.float64))
    for parameter, square in _squares(engine):
        name = names[id(parameter)]
        # At stage 0 several ranks hold the same gradient.
        replicas = dist.get_world_size() if engine.stage == 0 else 1
        if is_expert_tensor(name):
            replicas = max(replicas // engine.parallel.size, 1)
        part = part_of(name)
        squares[part] = squares[part].to(square.device) + square.double() / replicas
    device = next(engine.module.parameters()).device
    total = torch.stack([square.to(device) for square in squares.values()])
    dist.all_reduce(total)
    scale = engine.loss_scale
    return {part: value**0.5 / scale for part, value in zip(PARTS, total.tolist(), strict=True)}


def part_of(name: str) -> str:
    """Which of `PARTS` a trainable parameter belongs to, by its name."""
    for mark, part in MARKS.items():
        if f".{mark}." in f".{name}.":
            return part
    return "head"


def _squares(engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, sum of squares of what this rank keeps of its gradient)."""
    if engine.stage == 0:
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                yield parameter, _square(parameter.grad)
        return
    optimizer: Any = engine.deepspeed.optimizer
    groups = optimizer.fp16_groups if engine.stage == 3 else optimizer.params_in_partition
    offloaded = optimizer.offload_optimizer if engine.stage == 3 else optimizer.cpu_offload
    for index, parameters in enumerate(groups):
        if offloaded:
            # The gradients are in host memory already; DeepSpeed noted the norm of each piece on their way, and none where
            # this rank's piece of a parameter is empty.
            norms = optimizer.norm_for_param_grads
            for parameter in parameters:
                if (norm := norms.get(optimizer.get_param_id(parameter))) is not None:
                    yield parameter, torch.as_tensor(norm).double().square()
        else:
            pieces = [g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False)]
            for parameter, piece in zip(parameters, pieces, strict=False):  # behind them may be one of padding
                yield parameter, _square(piece)


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares in float64, without a copy of the gradient in it."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
