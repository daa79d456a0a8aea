"""Accuracy by likelihood: each possible answer is read after the prompt, and the most likely is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmole_dist.evaluation.metrics import Outcomes


def most_likely(
    alternatives: Outcomes, choices: Sequence[Sequence[str]], targets: Sequence[int]
) -> tuple[Outcomes, Tensor]:
    """From what a model said of every answer to what it takes in every row.

    Args:
        alternatives: of M sequences: all choices of the first row, all of the second, ...
        choices: texts of each of N rows.
        targets: index of the right one of each.

    Returns:
        Of the N rows, each with the loss of its right answer and the likeliest answer chosen; and (N,) what is chosen where the
        log likelihood is divided by the UTF-8 bytes of the answer, which does not favour short ones.
    """
    losses, first = alternatives.loss_N.split([len(texts) for texts in choices]), 0
    right, chosen, normalised = [], [], []
    for texts, loss_C, target in zip(choices, losses, targets, strict=True):
        size_C = torch.tensor([len(text.strip().encode()) or 1 for text in texts])
        chosen.append(int(loss_C.argmin()))
        normalised.append(int((loss_C / size_C).argmin()))
        right.append(first + target)
        first += len(texts)
    rows = alternatives.of(right)
    return (
        rows._replace(chosen_N=torch.tensor(chosen).double(), target_N=torch.tensor(targets).double()),
        torch.tensor(normalised).double(),
    )
