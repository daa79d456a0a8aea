"""Many ranks against one process that runs the same micro-batches with all experts: outputs, gradients, updates.

Each function runs on every rank and returns the largest relative distances it found there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from ldmole_dist.config import Optimisation
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import load_ds_config, resolve_ds_config
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.loss import answer_count, answer_loss, next_tokens
from ldmole_dist.model.backbone import enable_gradient_checkpointing
from ldmole_dist.parallel.dispatch import ExpertParallel, Mode
from ldmole_dist.selftest.tiny import EXPERTS, adapted, micro_batch, relative, tiny_backbone, whole
from ldmole_dist.tuner.model import tuner_of
from ldmole_dist.tuner.state_dict import is_expert_tensor

# Adam divides by the gradient's own size. With a usual eps and a larger step, the rounding of gradients near 0 grows until
# tokens cross the edge of a support or a ReLU, where gradients jump; what is compared here are the sums over ranks.
OPTIMISATION = Optimisation(
    learning_rate=1e-3,
    weight_decay=0.1,
    eps=1e-4,
    schedule="constant",
    max_grad_norm=0.3,  # below the norms that occur, so that clipping takes effect
)
MAX_GRAD_NORM = OPTIMISATION.max_grad_norm


def build(
    architecture: str,
    dtype: torch.dtype,
    parallel: ExpertParallel,
    checkpointing: bool = False,
    router: str = "sparsegen",
    num_experts: int | list[int] = EXPERTS,
) -> PeftModel:
    """A tiny adapted model on this process's device."""
    model = adapted(
        tiny_backbone(architecture, dtype, start().device), parallel, router=router, num_experts=num_experts
    )
    if checkpointing:
        enable_gradient_checkpointing(model)
    return model


def loss_of(
    model: Any, context_owner: PeftModel, batch: dict[str, Tensor], answers: Tensor | float
) -> tuple[Tensor, Tensor]:
    """(loss of one micro-batch, its logits); `answers` is the mean number of answers of a micro-batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = (
        answer_loss(logits, next_tokens(batch["labels"]), 0.1) / answers
        + tuner_of(context_owner).context.auxiliary_loss()
    )
    return loss, logits


def gradients(
    architecture: str,
    ep_size: int,
    checkpointing: bool,
    mode: Mode = "auto",
    router: str = "sparsegen",
    num_experts: int | list[int] = EXPERTS,
) -> dict[str, float]:
    """float64 without the engine: logits, loss and every gradient of one micro-batch a rank."""
    parallel, process = expert_parallel(ep_size, mode), start()
    world, device = process.world_size, process.device
    model = build(architecture, torch.float64, parallel, checkpointing, router, num_experts)
    batches = [micro_batch(rank, device) for rank in range(world)]
    answers = sum(answer_count(next_tokens(b["labels"])) for b in batches) / world
    loss, logits = loss_of(model, model, batches[process.rank], answers)
    loss.backward()

    reference = build(architecture, torch.float64, ExpertParallel(), router=router, num_experts=num_experts)
    ref_losses = []
    for rank, batch in enumerate(batches):
        ref_loss, ref_logits = loss_of(reference, reference, batch, answers)
        (ref_loss / world).backward()
        ref_losses.append(ref_loss.detach())
        if rank == process.rank:
            distances = {"logits": relative(logits.detach(), ref_logits.detach())}
    distances["loss"] = relative(loss.detach(), ref_losses[process.rank])
    ref_grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            grad = parameter.grad.clone()
            if is_expert_tensor(name) and ep_size > 1:
                # Every copy of the experts saw the tokens of its own group only.
                every = [torch.empty_like(grad) for _ in range(world)]
                dist.all_gather(every, grad)
                grad = torch.stack(every[process.rank % ep_size :: ep_size]).sum(0)
            else:
                dist.all_reduce(grad)
            distances[name] = relative(whole(model, name, grad) / world, ref_grads[name])
    return distances


class RoutingFlipped(Exception):
    """Rounding carried a token over the edge of a support, where the gradient jumps: both sides are right and differ."""


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
    """float32 through DeepSpeed: the update of every parameter after 3 optimizer steps of 2 micro-batches, clipping on.

    Args:
        architecture: "llama" or "qwen3".
        ds_config: name of a DeepSpeed config, as in "zero2".
        ep_size: ranks that share one copy of the experts.
        checkpointing: whether the decoder layers are recomputed in the backward.
        mode: what may move.
        router: its name.
        num_experts: of every linear, or by layer.
        zero: further settings of DeepSpeed's zero_optimization.
    """
    for supply in range(5):
        try:
            parallel = expert_parallel(ep_size, mode)
            model = build(architecture, torch.float32, parallel, checkpointing, router, num_experts)
            reference = build(architecture, torch.float32, ExpertParallel(), False, router, num_experts)
            return _updates(model, reference, ds_config, zero, 10_000 * supply)
        except RoutingFlipped:
            continue
    raise RoutingFlipped("in five supplies of batches: this is no longer rounding")


def _updates(
    model: PeftModel,
    reference: PeftModel,
    ds_config: str,
    zero: dict[str, Any],
    first_batch: int,
) -> dict[str, float]:
    steps, accumulation = 3, 2
    process = start()
    world, device = process.world_size, process.device
    before = {n: whole(model, n, p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}
    settings = load_ds_config(ds_config)
    settings["zero_optimization"].update(zero)
    engine = Engine(
        model,
        resolve_ds_config(
            settings,
            micro_batch_size=3,
            accumulation=accumulation,
            max_grad_norm=MAX_GRAD_NORM,
            precision="fp32",
            ep_size=tuner_of(model).parallel.size,
        ),
        OPTIMISATION,
    )
    trainable = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3, weight_decay=0.1, eps=1e-4)
    distances = {"loss": 0.0, "grad_norm": 0.0}
    for step in range(steps):
        all_batches = [micro_batch(first_batch + step * 100 + i, device) for i in range(world * accumulation)]
        answers = sum(answer_count(next_tokens(b["labels"])) for b in all_batches) / len(all_batches)
        flips = torch.zeros((), device=device)
        routed = []
        for turn in range(accumulation):
            loss, _ = loss_of(engine, model, all_batches[turn * world + process.rank], answers)
            engine.backward(loss)
            engine.step()
            routed.append(_active_pairs(model))
        optimizer.zero_grad()
        for i, batch in enumerate(all_batches):
            ref_loss, _ = loss_of(reference, reference, batch, answers)
            (ref_loss / len(all_batches)).backward()
            turn, rank = divmod(i, world)
            if rank == process.rank:
                flips += (routed[turn] != _active_pairs(reference)).sum()
            if rank == process.rank and turn == accumulation - 1:
                distances["loss"] = max(distances["loss"], relative(loss.detach(), ref_loss.detach()))
        dist.all_reduce(flips)
        if flips > 0:
            raise RoutingFlipped
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), MAX_GRAD_NORM)
        assert float(norm) > MAX_GRAD_NORM, "clipping was meant to do something"
        distances["grad_norm"] = max(distances["grad_norm"], abs(engine.grad_norm / float(norm) - 1))
        optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moved = tuner_of(model).full_parameter(name, parameter) - before[name]
            distances[name] = relative(moved, trainable[name].detach() - before[name])
    return distances


def _active_pairs(model: PeftModel) -> Tensor:
    """Number of active (token, expert) pairs of each linear in the last forward."""
    return torch.stack([stat[0] for stat in tuner_of(model).context.stats.values()])


def worst(results: list[dict[str, float]]) -> tuple[float, str]:
    """(largest distance over ranks and tensors, whose)."""
    # A NaN compares as neither smaller nor larger and would be passed over.
    return max((math.inf if math.isnan(d) else d, name) for result in results for name, d in result.items())
