"""Metrics computed from the outcomes of rows, without a model or ranks.

Shapes: N rows, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Outcomes(NamedTuple):
    """Outcomes of N rows; each field is an (N,) float64 tensor on the CPU.

    Args:
        loss_N: cross entropy in nats, summed over the answer tokens of a row; for sequence classification, that of the correct
            class.
        answers_N: number of answer tokens; 1 for sequence classification.
        greedy_N: 1 if every answer token is the most likely token of the vocabulary, or the correct class is the most likely
            class; else 0.
        chosen_N: index of the model's choice or class; -1 if the row has no choices or no answer tokens.
        target_N: index of the correct choice or class; -1 if the row has no choices or no answer tokens.
    """

    loss_N: Tensor
    answers_N: Tensor
    greedy_N: Tensor
    chosen_N: Tensor
    target_N: Tensor

    def select(self, rows: Sequence[int]) -> Outcomes:
        """Return the outcomes of the rows with the given indices."""
        return Outcomes(*(values[list(rows)] for values in self))


def rows_by_domain(domains: Sequence[str | None]) -> dict[str, list[int]]:
    """Return the row indices of each domain, sorted by domain; rows without a domain are omitted."""
    names = sorted({domain for domain in domains if domain is not None})
    return {name: [row for row, domain in enumerate(domains) if domain == name] for name in names}


def training_metrics(outcomes: Outcomes, domains: Sequence[str | None]) -> dict[str, float]:
    """Return the metrics that a training run reports.

    Args:
        outcomes: outcomes of N rows.
        domains: domain of each row; None for a row without one.

    Returns:
        "eval_loss": loss in nats per answer token. "accuracy": from 0 to 1; left out if no row has choices. The same metrics of
        each domain are "DOMAIN/eval_loss" and "DOMAIN/accuracy".
    """
    result = {}
    groups = {"": list(range(len(domains)))} | {f"{name}/": rows for name, rows in rows_by_domain(domains).items()}
    for prefix, rows in groups.items():
        values = compute_metrics(outcomes.select(rows))
        result[f"{prefix}eval_loss"] = values["loss"]
        if "accuracy" in values:
            result[f"{prefix}accuracy"] = values["accuracy"]
    return result


def compute_metrics(outcomes: Outcomes, classes: int | None = None) -> dict[str, float]:
    """Return all metrics of a set of rows.

    Args:
        outcomes: outcomes of the rows.
        classes: K if all rows have the same K choices, else None.

    Returns:
        "rows": number of rows. "answers": number of answer tokens. "loss": in nats per answer token. "perplexity": exp(loss).
        If any row has choices, over these rows: "accuracy" (0 to 1), its standard error "accuracy_stderr" and, with `classes`,
        "f1_macro" and "matthews".
    """
    answers = float(outcomes.answers_N.sum())
    loss = float(outcomes.loss_N.sum()) / max(answers, 1)
    result = {"rows": len(outcomes.loss_N), "answers": int(answers), "loss": loss, "perplexity": _perplexity(loss)}
    has_choices = outcomes.chosen_N >= 0
    if has_choices.any():
        correct_N = (outcomes.chosen_N == outcomes.target_N)[has_choices]
        result |= mean_and_stderr("accuracy", correct_N)
        if classes is not None:
            confusion_KK = confusion_matrix(
                outcomes.target_N[has_choices].long(), outcomes.chosen_N[has_choices].long(), classes
            )
            result |= {"f1_macro": f1_macro(confusion_KK), "matthews": matthews(confusion_KK)}
    return result


def mean_and_stderr(name: str, correct_N: Tensor) -> dict[str, float]:
    """Return the mean of N booleans under `name`, and its standard error (NaN if N is 1) under `name` + "_stderr"."""
    rows, mean = len(correct_N), float(correct_N.double().mean())
    # The variance estimate divides by N - 1, as lm-eval's does.
    return {name: mean, f"{name}_stderr": math.sqrt(mean * (1 - mean) / (rows - 1)) if rows > 1 else math.nan}


def confusion_matrix(target_N: Tensor, chosen_N: Tensor, classes: int) -> Tensor:
    """Return the confusion matrix (K, K) in float64: its rows are targets, its columns choices."""
    return torch.bincount(target_N * classes + chosen_N, minlength=classes**2).view(classes, classes).double()


def f1_macro(confusion_KK: Tensor) -> float:
    """Return the macro F1: the mean of 2 TP / (2 TP + FP + FN) over the classes that occur as a target or a choice."""
    occurrences_K = confusion_KK.sum(0) + confusion_KK.sum(1)
    occurs = occurrences_K > 0
    return float((2 * confusion_KK.diagonal()[occurs] / occurrences_K[occurs]).mean())


def matthews(confusion_KK: Tensor) -> float:
    """Return the Matthews correlation coefficient for K classes (Gorodkin, 2004), from -1 to 1.

    It is 0 if all rows have the same target or the same choice.
    """
    rows, correct = confusion_KK.sum(), confusion_KK.trace()
    target_K, chosen_K = confusion_KK.sum(1), confusion_KK.sum(0)
    product = (rows**2 - (chosen_K**2).sum()) * (rows**2 - (target_K**2).sum())
    return float((correct * rows - (target_K * chosen_K).sum()) / product.sqrt()) if product > 0 else 0.0


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # math.exp overflows above 709
