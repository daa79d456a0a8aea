"""Reference results of parity: one process that runs the micro-batches of all ranks with all experts.

Rank 0 computes each reference once in its lifetime and sends it to the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftModel
from torch import Tensor

from ldmole_dist.config import Optimisation
from ldmole_dist.distributed import broadcast_from_main, raise_on_all_ranks
from ldmole_dist.engine.startup import start
from ldmole_dist.loss import answer_count, answer_loss, next_tokens
from ldmole_dist.model.backbone import enable_gradient_checkpointing
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.selftest.tiny import EXPERTS, adapted, micro_batch, tiny_backbone
from ldmole_dist.tuner.model import tuner_of

T = TypeVar("T")

STEPS, ACCUMULATION = 3, 2

# Adam divides by the gradient's magnitude. With the usual eps and a larger step, rounding errors of gradients near 0 grow
# until tokens cross the boundary of a support or a ReLU, where gradients are discontinuous. Parity is about the sums over
# ranks instead.
OPTIMISATION = Optimisation(
    learning_rate=1e-3,
    weight_decay=0.1,
    eps=1e-4,
    schedule="constant",
    max_grad_norm=0.3,  # below the norms that occur, so that clipping takes effect
)
MAX_GRAD_NORM = OPTIMISATION.max_grad_norm


class Gradients(NamedTuple):
    """One forward and backward in float64.

    Attributes:
        logits: by micro-batch.
        losses: by micro-batch.
        gradients: of the mean loss, by parameter.
    """

    logits: list[Tensor]
    losses: list[Tensor]
    gradients: dict[str, Tensor]


class Updates(NamedTuple):
    """`STEPS` optimizer steps in float32.

    Attributes:
        losses: by step and micro-batch.
        active_pairs: as of the function `active_pairs`, by step and micro-batch.
        grad_norms: before clipping, by step.
        updates: difference of each parameter over all steps.
    """

    losses: list[list[Tensor]]
    active_pairs: list[list[Tensor]]
    grad_norms: list[float]
    updates: dict[str, Tensor]


_computed: dict[str, Any] = {}


def gradient_reference(architecture: str, router: str, num_experts: int | list[int]) -> Gradients:
    """Return the gradients of micro-batches 0 to world size - 1; every rank calls it."""
    return _on_rank_0(_gradients, architecture, router, num_experts, start().world_size)


def update_reference(architecture: str, router: str, num_experts: int | list[int], first_batch: int) -> Updates:
    """Return the updates for the batches of `update_batches`; every rank calls it."""
    return _on_rank_0(_updates, architecture, router, num_experts, start().world_size, first_batch)


def update_batches(first_batch: int, step: int, world_size: int) -> list[dict[str, Tensor]]:
    """Return the micro-batches of an optimizer step, those of all ranks in turn for each accumulation step."""
    first = first_batch + step * 100
    return [micro_batch(first + i, start().device) for i in range(world_size * ACCUMULATION)]


def _on_rank_0(function: Callable[..., T], *args: Any) -> T:
    key = f"{function.__name__}{args}"
    if key not in _computed:
        value = None
        with raise_on_all_ranks("computing the reference"):
            if start().is_main:
                value = function(*args)
        _computed[key] = broadcast_from_main(value)
    return _computed[key]  # type: ignore[no-any-return]


def _gradients(architecture: str, router: str, num_experts: int | list[int], world_size: int) -> Gradients:
    model = build(architecture, torch.float64, ExpertParallel(), router=router, num_experts=num_experts)
    batches = [micro_batch(rank, start().device) for rank in range(world_size)]
    answers = mean_answers(batches)
    logits, losses = [], []
    for batch in batches:
        loss, batch_logits = loss_of(model, model, batch, answers)
        (loss / world_size).backward()
        logits.append(batch_logits.detach().cpu())
        losses.append(loss.detach().cpu())
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Gradients(logits, losses, gradients)


def _updates(
    architecture: str, router: str, num_experts: int | list[int], world_size: int, first_batch: int
) -> Updates:
    model = build(architecture, torch.float32, ExpertParallel(), router=router, num_experts=num_experts)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.AdamW(
        trainable.values(),
        lr=OPTIMISATION.learning_rate,
        weight_decay=OPTIMISATION.weight_decay,
        eps=OPTIMISATION.eps,
    )
    losses: list[list[Tensor]] = []
    pairs: list[list[Tensor]] = []
    norms: list[float] = []
    for step in range(STEPS):
        batches = update_batches(first_batch, step, world_size)
        answers = mean_answers(batches)
        optimizer.zero_grad()
        losses.append([])
        pairs.append([])
        for batch in batches:
            loss, _ = loss_of(model, model, batch, answers)
            (loss / len(batches)).backward()
            losses[-1].append(loss.detach().cpu())
            pairs[-1].append(active_pairs(model).cpu())
        norm = float(torch.nn.utils.clip_grad_norm_(trainable.values(), MAX_GRAD_NORM))
        assert norm > MAX_GRAD_NORM, f"a gradient norm of {norm} is not clipped at {MAX_GRAD_NORM}"
        norms.append(norm)
        optimizer.step()
    return Updates(losses, pairs, norms, {name: (p.detach() - before[name]).cpu() for name, p in trainable.items()})


def build(
    architecture: str,
    dtype: torch.dtype,
    parallel: ExpertParallel,
    checkpointing: bool = False,
    router: str = "sparsegen",
    num_experts: int | list[int] = EXPERTS,
) -> PeftModel:
    """Return a tiny adapted model on this process's device, with the same weights in every process."""
    backbone = tiny_backbone(architecture, dtype, start().device)
    model = adapted(backbone, parallel, router=router, num_experts=num_experts)
    if checkpointing:
        enable_gradient_checkpointing(model)
    return model


def loss_of(
    model: Any, context_owner: PeftModel, batch: dict[str, Tensor], answers: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Run one micro-batch forward.

    Args:
        model: called for the logits: a model or an engine around it.
        context_owner: the model itself, which has the auxiliary losses.
        batch: of `micro_batch`.
        answers: number of answer tokens that the loss is divided by.

    Returns:
        The loss, auxiliary losses included, and the logits.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = (
        answer_loss(logits, next_tokens(batch["labels"]), 0.1) / answers
        + tuner_of(context_owner).context.auxiliary_loss()
    )
    return loss, logits


def mean_answers(batches: list[dict[str, Tensor]]) -> float:
    """Return the mean number of answer tokens of a micro-batch."""
    return float(sum(answer_count(next_tokens(batch["labels"])) for batch in batches)) / len(batches)


def active_pairs(model: PeftModel) -> Tensor:
    """Return the number of active (token, expert) pairs of each linear in the last forward."""
    return torch.stack([stat[0] for stat in tuner_of(model).context.stats.values()])
