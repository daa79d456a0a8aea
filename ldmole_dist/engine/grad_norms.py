"""Gradient norms of the parts of an adapter, just before the optimizer step.

Each rank sums the squares of the reduced gradients that it holds, and one small all-reduce adds the sums of all ranks. The
ZeRO stage determines where DeepSpeed 0.19.8 stores the gradients; a test compares the result with the norm that the engine
reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.build import Engine
from ldmole_dist.tuner.state_dict import is_expert_tensor

# Part that a trainable parameter belongs to, by a component of its name.
MARKS = {"lora_A": "experts_A", "lora_B": "experts_B", "router": "router", "ldmole_lambda_mlp": "lambda_mlp"}
PARTS = (*MARKS.values(), "head")


def gradient_norms(engine: Engine) -> dict[str, float]:
    """Return the gradient norm of each part before clipping.

    Collective: every rank must call it, after the last backward of a step.

    Returns:
        The norm of each of `PARTS`, over all ranks and linears. "head" covers the modules that are trained in full.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    squares = dict.fromkeys(PARTS, torch.zeros((), dtype=torch.float64))
    for parameter, square in _squares(engine):
        name = names[id(parameter)]
        # At stage 0, every rank that holds a parameter has its whole gradient, and the sum over ranks below counts it once for
        # each of them: all ranks or, for an expert, those with the same experts.
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
    """Return which of `PARTS` the trainable parameter `name` belongs to."""
    for mark, part in MARKS.items():
        if f".{mark}." in f".{name}.":
            return part
    return "head"


def _squares(engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter with the sum of squares of its gradient, or of this rank's shard of the gradient."""
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
            # The gradients are already in host memory. DeepSpeed computed and stored the norm of each shard before it copied
            # the shard to the host. If this rank holds no shard of a parameter, no norm is stored.
            norms = optimizer.norm_for_param_grads
            for parameter in parameters:
                if (norm := norms.get(optimizer.get_param_id(parameter))) is not None:
                    yield parameter, torch.as_tensor(norm).double().square()
        else:
            shards = [g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False)]
            # Not strict: a shard of padding may follow the shards of parameters.
            for parameter, shard in zip(parameters, shards, strict=False):
                yield parameter, _square(shard)


def _square(gradient: Tensor) -> Tensor:
    """Return the sum of squares, computed in float64. On a CPU this makes a temporary float64 copy of the gradient."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
