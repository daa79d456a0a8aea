"""Choose each row's answer by the log likelihood of all tokens of the answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmole_dist.evaluation.metrics import Outcomes


def choose_by_likelihood(
    sequences: Outcomes, choices: Sequence[Sequence[str]], targets: Sequence[int]
) -> tuple[Outcomes, Tensor]:
    """Choose the most likely answer of each of N rows.

    Args:
        sequences: outcomes of one sequence per choice: all choices of the first row, then all choices of the second row, and so
            on.
        choices: texts of the choices of each row.
        targets: index of the correct choice of each row.

    Returns:
        Outcomes of the N rows. `chosen_N` is the index of the choice with the highest log likelihood, and `target_N` that of
        the correct choice; `loss_N`, `answers_N` and `greedy_N` are the outcomes of the correct choice.

        (N,) float64 tensor: index of each row's choice with the highest log likelihood per UTF-8 byte of its text without
        surrounding white space; unlike the total log likelihood, this does not favor short answers.
    """
    losses, first = sequences.loss_N.split([len(texts) for texts in choices]), 0
    correct, chosen, normalized = [], [], []
    for texts, loss_C, target in zip(choices, losses, targets, strict=True):
        bytes_C = torch.tensor([len(text.strip().encode()) or 1 for text in texts])
        chosen.append(int(loss_C.argmin()))
        normalized.append(int((loss_C / bytes_C).argmin()))
        correct.append(first + target)
        first += len(texts)
    rows = sequences.select(correct)
    return (
        rows._replace(chosen_N=torch.tensor(chosen).double(), target_N=torch.tensor(targets).double()),
        torch.tensor(normalized).double(),
    )
