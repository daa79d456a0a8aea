"""Locate the source of a NaN or infinite loss or gradient, by repeating the forward with hooks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.training_state import local_shard
from ldmole_dist.model.forward import batch_logits


@torch.no_grad()
def explain_nonfinite(engine: Engine, batch: dict[str, Tensor], own_loss_is_bad: bool) -> str:
    """Repeat the forward of a micro-batch and name each rank's first module output and first parameter that is not finite.

    Collective: every rank must call it.

    Args:
        engine: engine that computed the non-finite value.
        batch: micro-batch whose loss was non-finite on this rank; any micro-batch if no loss was non-finite on this rank.
        own_loss_is_bad: whether the loss of `batch` was non-finite.

    Returns:
        Description for the error message, the same on every rank.
    """
    parameter = _first_nonfinite_parameter(engine)
    layer = _first_nonfinite_layer(engine, batch)
    finding = {"rank": dist.get_rank(), "loss": own_loss_is_bad, "parameter": parameter, "layer": layer}
    findings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    texts = [f"rank {found['rank']}: {text}" for found in findings if (text := _describe(found))]
    return "; ".join(texts) or (
        "the repeated forward is finite on every rank; if parallelism.precision is bf16 or fp16, try fp32"
    )


def _describe(found: dict[str, Any]) -> str:
    """Return the description of one rank's finding; empty if everything is finite."""
    output = "the outputs are finite, but the loss is not" if found["loss"] else ""
    if found["layer"]:
        output = f"first non-finite output in {found['layer']}"
    shard = f"its shard of {found['parameter']} is not finite" if found["parameter"] else ""
    return f"{output} ({shard})" if output and shard else output or shard


def _first_nonfinite_parameter(engine: Engine) -> str | None:
    for name, parameter in engine.module.named_parameters():
        shard = local_shard(parameter)
        if shard.is_floating_point() and not shard.isfinite().all():
            return name
    return None


def _first_nonfinite_layer(engine: Engine, batch: dict[str, Tensor]) -> str | None:
    nonfinite: list[str] = []

    def make_hook(name: str) -> Any:
        def check_output(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not nonfinite and not output.isfinite().all():
                nonfinite.append(name)

        return check_output

    # A forward hook runs when its module returns, so an inner module is recorded before the modules that contain it.
    hooks = [module.register_forward_hook(make_hook(name)) for name, module in engine.module.named_modules()]
    try:
        batch_logits(engine.module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return nonfinite[0] if nonfinite else None
