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


def answer_count(labels: Tensor) -> Tensor:
    """How many answers a batch of labels holds, as a scalar integer tensor.

    Args:
        labels: (B, S) token ids where the answer is, -100 elsewhere; the first column is never predicted. Or (B,) classes.
    """
    return ((labels[:, 1:] if labels.dim() == 2 else labels) != IGNORED).sum()


def answer_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross entropy of the answers, in at least float32.

    Args:
        logits: (B, S, V) for token labels, position s predicting label s + 1; (B, V) for classes.
        labels: (B, S) or (B,), -100 where there is none.
        label_smoothing: share of the target spread over all V.

    Returns:
        Scalar sum; 0 attached to the graph if there is no answer.
    """
    if labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.flatten(0, -2), labels.flatten()
    answers = labels != IGNORED
    wide = logits[answers].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels[answers], label_smoothing=label_smoothing, reduction="sum")


def answer_positions(labels: Tensor) -> Tensor:
    """Sorted positions (of any sequence) whose logits `answer_loss` needs: the ones before an answer token.

    Args:
        labels: (B, S).

    Returns:
        (S',) positions, at least one, so that a model can be asked for these logits only.
    """
    needed = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    return needed if len(needed) else needed.new_zeros(1)
