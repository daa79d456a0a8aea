"""The task loss of a training step: cross entropy over the answer tokens, or over the labels of sequence classification.

The task loss of an optimizer step is the cross entropy summed over the answers (tokens or labels) of all ranks and
micro-batches, divided by the number of answers. The engine averages gradients over ranks and micro-batches, so the trainer
multiplies the summed cross entropy of a micro-batch by ranks * micro-batches / answers. Auxiliary losses are averaged over
ranks and micro-batches.

Shapes: B sequences, S positions, S' positions that need logits, V vocabulary size or number of classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label that torch's cross_entropy and the models of transformers ignore


def next_tokens(labels: Tensor) -> Tensor:
    """Return the target of each position: the label of the next position.

    Args:
        labels: (B, S) token ids of the answers, -100 elsewhere.

    Returns:
        (B, S) targets; -100 in the last position.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def answer_positions(targets: Tensor) -> Tensor:
    """Return the positions at which at least one sequence has a target. Only these need logits.

    Args:
        targets: (B, S), -100 where there is no target.

    Returns:
        (S',) positions in ascending order; at least one, even if there is no target.
    """
    # A batch without an answer must still run the whole model, because the other ranks wait in its collectives.
    needed = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    return needed if len(needed) else needed.new_zeros(1)


def answer_count(targets: Tensor) -> Tensor:
    """Return the number of targets that are not -100, as a scalar integer tensor."""
    return (targets != IGNORED).sum()


def answer_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each target, in at least float32.

    Args:
        logits: (..., V).
        targets: (...) token ids or classes, -100 where there is no target.

    Returns:
        (...) cross entropy, 0 where there is no target.
    """
    answers = targets != IGNORED
    losses = torch.zeros(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    losses[answers] = F.cross_entropy(logits[answers].to(losses.dtype), targets[answers], reduction="none")
    return losses


def answer_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the summed cross entropy of all targets, in at least float32.

    Args:
        logits: (..., V).
        targets: (...) token ids or classes, -100 where there is no target.
        label_smoothing: probability that is spread uniformly over all V classes.

    Returns:
        Scalar sum; 0, but attached to the graph, if there is no target.
    """
    logits, targets = logits.flatten(0, -2), targets.flatten()
    answers = targets != IGNORED
    wide = logits[answers].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets[answers], label_smoothing=label_smoothing, reduction="sum")
