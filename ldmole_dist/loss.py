"""The loss of a training step: answer tokens (or labels) of the whole optimizer step, plus the auxiliary losses.

Normalisation (METHOD, Losses): the task loss is the sum over answers divided by the number of answers of the whole
optimizer step, all ranks and micro-batches together; auxiliary losses are averaged over micro-batches and ranks. The engine
averages gradients over both, so a rank's share of the task loss is scaled up by their number.

Shapes: B sequences, S positions, V vocabulary or classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def next_tokens(labels: Tensor) -> Tensor:
    """What each position should predict.

    Args:
        labels: (B, S) token ids where the answer is, -100 elsewhere.

    Returns:
        (B, S): the label of the position after, -100 for the last.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def answer_positions(targets: Tensor) -> Tensor:
    """Positions at which any sequence has a target: the only logits that the loss needs.

    Args:
        targets: (B, S), -100 where there is none.

    Returns:
        (S',) ascending, at least one (a batch without an answer still runs the whole model, as on every other rank).
    """
    needed = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    return needed if len(needed) else needed.new_zeros(1)


def answer_count(targets: Tensor) -> Tensor:
    """Number of targets, a scalar integer tensor."""
    return (targets != IGNORED).sum()


def answer_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each answer, in at least float32.

    Args:
        logits: (..., V).
        targets: (...) token ids or classes, -100 where there is none.

    Returns:
        (...), 0 where there is no answer.
    """
    answers = targets != IGNORED
    losses = torch.zeros(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    losses[answers] = F.cross_entropy(logits[answers].to(losses.dtype), targets[answers], reduction="none")
    return losses


def answer_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross entropy of the answers, in at least float32.

    Args:
        logits: (..., V).
        targets: (...) token ids or classes, -100 where there is none.
        label_smoothing: share of the target spread over all V.

    Returns:
        Scalar sum; 0 attached to the graph if there is no answer.
    """
    logits, targets = logits.flatten(0, -2), targets.flatten()
    answers = targets != IGNORED
    wide = logits[answers].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets[answers], label_smoothing=label_smoothing, reduction="sum")
