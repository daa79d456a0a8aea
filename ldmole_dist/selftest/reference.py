"""Reference results for `parity`, from one process that runs the micro-batches of all ranks with all experts.

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
# until tokens cross the boundary of a support or a ReLU, where gradients are discontinuous. Parity tests the sums over ranks,
# not these rounding errors.
OPTIMISATION = Optimisation(
    learning_rate=1e-3,
    weight_decay=0.1,
    eps=1e-4,
    schedule="constant",
    max_grad_norm=0.3,  # smaller than the gradient norms that occur, so that clipping takes effect
)
MAX_GRAD_NORM = OPTIMISATION.max_grad_norm


class Gradients(NamedTuple):
    """Results of a forward and backward of each micro-batch in float64; tensors are on the CPU.

    Attributes:
        logits: logits of each micro-batch.
        losses: loss of each micro-batch.
        gradients: gradients of the mean loss over the micro-batches, by parameter name.
    """

    logits: list[Tensor]
    losses: list[Tensor]
    gradients: dict[str, Tensor]


class Updates(NamedTuple):
    """Results of `STEPS` optimizer steps in float32; tensors are on the CPU.

    Attributes:
        losses: loss of each micro-batch, by step.
        active_pairs: result of the function `active_pairs` for each micro-batch, by step.
        grad_norms: gradient norm before clipping, by step.
        updates: change of each parameter over all steps, by name.
    """

    losses: list[list[Tensor]]
    active_pairs: list[list[Tensor]]
    grad_norms: list[float]
    updates: dict[str, Tensor]


# Results of `_on_rank_0`, keyed by the name of the function and its arguments.
_computed: dict[str, Any] = {}


def gradient_reference(architecture: str, router: str, num_experts: int | list[int]) -> Gradients:
    """Return the reference for `parity.gradients`: the results for micro-batches 0 to world size - 1.

    Collective: every rank must call it.

    Args:
        architecture, router, num_experts: arguments of `build`.
    """
    return _on_rank_0(_gradients, architecture, router, num_experts, start().world_size)


def update_reference(architecture: str, router: str, num_experts: int | list[int], first_batch: int) -> Updates:
    """Return the reference for `parity.updates`: the results for the micro-batches of `update_batches`.

    Collective: every rank must call it.

    Args:
        architecture, router, num_experts: arguments of `build`.
        first_batch: argument of `update_batches`.
    """
    return _on_rank_0(_updates, architecture, router, num_experts, start().world_size, first_batch)


def update_batches(first_batch: int, step: int, world_size: int) -> list[dict[str, Tensor]]:
    """Return the micro-batches of all ranks in an optimizer step; number i belongs to rank i % world_size.

    Args:
        first_batch: index of the first micro-batch of step 0, for `micro_batch`.
        step: index of the optimizer step.
        world_size: number of ranks.
    """
    first = first_batch + step * 100
    return [micro_batch(first + i, start().device) for i in range(world_size * ACCUMULATION)]


def _on_rank_0(function: Callable[..., T], *args: Any) -> T:
    """Return `function(*args)`, computed on rank 0 and sent to all ranks. Collective: every rank must call it.

    Later calls with the same function and arguments return the stored result.
    """
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
    """Return a tiny adapted model on the device of this process.

    Every process gets the same weights, except that it holds only the experts that `parallel` places on it.

    Args:
        architecture: as in `tiny_backbone`.
        dtype: data type of the backbone.
        parallel: placement of the experts.
        checkpointing: whether the decoder layers are recomputed in the backward.
        router: name of the router.
        num_experts: number of experts of every adapted linear, or a list with one number per decoder layer.
    """
    backbone = tiny_backbone(architecture, dtype, start().device)
    model = adapted(backbone, parallel, router=router, num_experts=num_experts)
    if checkpointing:
        enable_gradient_checkpointing(model)
    return model


def loss_of(
    model: Any, context_owner: PeftModel, batch: dict[str, Tensor], answers: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Run the forward of one micro-batch and compute its loss, with label smoothing 0.1.

    Args:
        model: adapted model, or an engine around it; called for the logits.
        context_owner: the adapted model, which has the auxiliary losses in its context.
        batch: micro-batch in the format of `micro_batch`.
        answers: number of answer tokens by which the summed loss is divided.

    Returns:
        The loss (scalar), including the auxiliary losses, and the logits (sequences, positions, vocabulary).
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = (
        answer_loss(logits, next_tokens(batch["labels"]), 0.1) / answers
        + tuner_of(context_owner).context.auxiliary_loss()
    )
    return loss, logits


def mean_answers(batches: list[dict[str, Tensor]]) -> float:
    """Return the mean number of answer tokens per micro-batch."""
    return float(sum(answer_count(next_tokens(batch["labels"])) for batch in batches)) / len(batches)


def active_pairs(model: PeftModel) -> Tensor:
    """Return the numbers of active (token, expert) pairs in the last forward, without padding: (N,), one per adapted linear."""
    return torch.stack([stat[0] for stat in tuner_of(model).context.stats.values()])
