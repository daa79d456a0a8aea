"""Compare training on several ranks with one process that runs the same micro-batches with all experts.

Every rank calls `gradients` and `updates`. They return the relative distances on this rank as a dict, whose keys are parameter
names, "loss" and, for `gradients`, "logits" or, for `updates`, "grad_norm".
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel

from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import load_ds_config, resolve_ds_config
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.parallel.dispatch import Mode
from ldmole_dist.selftest.reference import (
    ACCUMULATION,
    MAX_GRAD_NORM,
    OPTIMISATION,
    STEPS,
    Updates,
    active_pairs,
    build,
    gradient_reference,
    loss_of,
    mean_answers,
    update_batches,
    update_reference,
)
from ldmole_dist.selftest.tiny import EXPERTS, micro_batch, relative, whole
from ldmole_dist.tuner.model import tuner_of
from ldmole_dist.tuner.state_dict import is_expert_tensor

ATTEMPTS = 5  # sets of batches that `updates` tries if rounding changes a routing decision


def gradients(
    architecture: str,
    ep_size: int,
    checkpointing: bool,
    mode: Mode = "auto",
    router: str = "sparsegen",
    num_experts: int | list[int] = EXPERTS,
) -> dict[str, float]:
    """Return the distances of logits, loss and gradients from `gradient_reference`, in float64 and without DeepSpeed.

    Each rank processes one micro-batch. The gradients are those of the mean loss over all ranks. Collective: every rank must
    call it.

    Args:
        architecture: as in `tiny_backbone`.
        ep_size: number of ranks that share one copy of the experts.
        checkpointing: whether the decoder layers are recomputed in the backward.
        mode: mode of the expert-parallel dispatch.
        router: name of the router.
        num_experts: number of experts of every adapted linear, or a list with one number per decoder layer.
    """
    reference = gradient_reference(architecture, router, num_experts)
    parallel, process = expert_parallel(ep_size, mode), start()
    rank, world, device = process.rank, process.world_size, process.device
    model = build(architecture, torch.float64, parallel, checkpointing, router, num_experts)
    answers = mean_answers([micro_batch(other, device) for other in range(world)])
    loss, logits = loss_of(model, model, micro_batch(rank, device), answers)
    loss.backward()

    distances = {
        "logits": relative(logits.detach(), reference.logits[rank].to(device)),
        "loss": relative(loss.detach(), reference.losses[rank].to(device)),
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            grad = parameter.grad.clone()
            if is_expert_tensor(name) and ep_size > 1:
                # Each copy of the experts received only the tokens of its own group of ranks.
                grads = [torch.empty_like(grad) for _ in range(world)]
                dist.all_gather(grads, grad)
                grad = torch.stack(grads[rank % ep_size :: ep_size]).sum(0)
            else:
                dist.all_reduce(grad)
            distances[name] = relative(whole(model, name, grad) / world, reference.gradients[name].to(device))
    return distances


class RoutingFlipped(Exception):
    """Raised if a linear's number of active (token, expert) pairs differs from the reference in any micro-batch of a step.

    Rounding can move a token across the boundary of a support, where the gradient is discontinuous. The results then differ
    although neither is wrong.
    """


def updates(
    architecture: str,
    ds_config: str,
    ep_size: int,
    checkpointing: bool,
    mode: Mode = "auto",
    router: str = "sparsegen",
    num_experts: int | list[int] = EXPERTS,
    **zero: Any,
) -> dict[str, float]:
    """Return the distances of losses, gradient norms and parameter updates from `update_reference`, in float32 with DeepSpeed.

    Runs `STEPS` optimizer steps with gradient clipping; "loss" and "grad_norm" are the largest distances over these.
    Collective: every rank must call it.

    Args:
        architecture: as in `tiny_backbone`.
        ds_config: name of a shipped DeepSpeed config, such as "zero2".
        ep_size: number of ranks that share one copy of the experts.
        checkpointing: whether the decoder layers are recomputed in the backward.
        mode: mode of the expert-parallel dispatch.
        router: name of the router.
        num_experts: number of experts of every adapted linear, or a list with one number per decoder layer.
        zero: settings that override those in the zero_optimization section of that config.

    Raises:
        RoutingFlipped: if the routing differed from the reference in each of ATTEMPTS attempts.
    """
    settings = load_ds_config(ds_config)
    settings["zero_optimization"].update(zero)
    for attempt in range(ATTEMPTS):
        first_batch = 10_000 * attempt
        reference = update_reference(architecture, router, num_experts, first_batch)
        model = build(architecture, torch.float32, expert_parallel(ep_size, mode), checkpointing, router, num_experts)
        try:
            return _updates(model, reference, settings, first_batch)
        except RoutingFlipped:
            continue
    raise RoutingFlipped(
        f"the routing differed from the reference for all {ATTEMPTS} sets of batches, which rounding does not explain; check "
        "the router and the dispatch"
    )


def _updates(model: PeftModel, reference: Updates, settings: dict[str, Any], first_batch: int) -> dict[str, float]:
    """Train the model on the batches of the reference and return the distances; raise RoutingFlipped if the routing differs."""
    process = start()
    rank, world, device = process.rank, process.world_size, process.device
    before = {n: whole(model, n, p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}
    ds_config = resolve_ds_config(
        settings,
        micro_batch_size=3,
        accumulation=ACCUMULATION,
        max_grad_norm=MAX_GRAD_NORM,
        precision="fp32",
        ep_size=tuner_of(model).parallel.size,
    )
    engine = Engine(model, ds_config, OPTIMISATION)
    distances = {"loss": 0.0, "grad_norm": 0.0}
    for step in range(STEPS):
        batches = update_batches(first_batch, step, world)
        answers = mean_answers(batches)
        flips = torch.zeros((), device=device)
        for index in range(rank, len(batches), world):
            loss, _ = loss_of(engine, model, batches[index], answers)
            engine.backward(loss)
            engine.step()
            flips += (active_pairs(model) != reference.active_pairs[step][index].to(device)).sum()
            distance = relative(loss.detach(), reference.losses[step][index].to(device))
            distances["loss"] = max(distances["loss"], distance)
        dist.all_reduce(flips)
        if flips > 0:
            raise RoutingFlipped
        distances["grad_norm"] = max(distances["grad_norm"], abs(engine.grad_norm / reference.grad_norms[step] - 1))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            update = tuner_of(model).full_parameter(name, parameter) - before[name]
            distances[name] = relative(update, reference.updates[name].to(device))
    return distances


def worst(results: list[dict[str, float]]) -> tuple[float, str]:
    """Return the largest distance over all ranks and comparisons, and the name of its comparison.

    Args:
        results: distances by name of the comparison, for each rank; NaN is treated as infinity.
    """
    # `max` could skip a NaN, because every comparison with NaN is False.
    return max((math.inf if math.isnan(d) else d, name) for result in results for name, d in result.items())
