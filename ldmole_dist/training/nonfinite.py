"""Where a loss that is no number came from: one more forward, watched."""

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
    """Run a micro-batch again on every rank and name the first layer whose output is not finite.

    Every rank calls it, and gets the same text.

    Args:
        engine: that produced the loss.
        batch: the micro-batch that did it on this rank, any one elsewhere.
        own_loss_is_bad: whether it was this rank's.
    """
    parameter = _first_bad_parameter(engine)
    layer = _first_bad_layer(engine, batch)
    finding = {"rank": dist.get_rank(), "loss": own_loss_is_bad, "parameter": parameter, "layer": layer}
    findings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    texts = []
    for found in findings:
        if found["loss"] or found["parameter"] or found["layer"]:
            texts.append(
                f"rank {found['rank']}: first non-finite output in {found['layer'] or 'the loss itself'}"
                + (f", and its part of parameter {found['parameter']} is not finite" if found["parameter"] else "")
            )
    return "; ".join(texts) or "run again in fp32 or bf16, nothing non-finite shows in a second forward"


def _first_bad_parameter(engine: Engine) -> str | None:
    for name, parameter in engine.module.named_parameters():
        held = local_shard(parameter)
        if held.is_floating_point() and not held.isfinite().all():
            return name
    return None


def _first_bad_layer(engine: Engine, batch: dict[str, Tensor]) -> str | None:
    bad: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bad and not output.isfinite().all():
                bad.append(name)

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in engine.module.named_modules()]
    try:
        batch_logits(engine.module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None
