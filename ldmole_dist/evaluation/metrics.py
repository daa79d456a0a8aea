"""From what a model said of each row to numbers; no model, no ranks.

Shapes: N rows, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Outcomes(NamedTuple):
    """Of N rows, each (N,) in float64 on the CPU.

    Args:
        loss_N: summed cross entropy of a row's answer tokens, in nats (or of its class).
        answers_N: number of those tokens.
        greedy_N: 1 where each of them is the most likely one of the vocabulary, else 0.
        chosen_N: index of the choice or class that the model takes, -1 where there are none.
        target_N: index of the right one, -1 likewise.
    """

    loss_N: Tensor
    answers_N: Tensor
    greedy_N: Tensor
    chosen_N: Tensor
    target_N: Tensor

    def of(self, rows: Sequence[int]) -> Outcomes:
        """Of some rows."""
        return Outcomes(*(values[list(rows)] for values in self))


def rows_by_domain(domains: Sequence[str | None]) -> dict[str, list[int]]:
    """Domain -> its rows, in the order of names; rows without a domain are in none."""
    names = sorted({domain for domain in domains if domain is not None})
    return {name: [row for row, domain in enumerate(domains) if domain == name] for name in names}


def training_metrics(outcomes: Outcomes, domains: Sequence[str | None]) -> dict[str, float]:
    """What a training run reports.

    Args:
        outcomes: of N rows.
        domains: of these.

    Returns:
        "eval_loss" (mean over answer tokens), and "accuracy" (share of rows, 0 to 1) where there is something to choose; the
        same as "code/eval_loss", "code/accuracy" of the rows of each domain.
    """
    result = {}
    every = {"": list(range(len(domains)))} | {f"{name}/": rows for name, rows in rows_by_domain(domains).items()}
    for prefix, rows in every.items():
        values = measures(outcomes.of(rows))
        result[f"{prefix}eval_loss"] = values["loss"]
        if "accuracy" in values:
            result[f"{prefix}accuracy"] = values["accuracy"]
    return result


def measures(outcomes: Outcomes, classes: int | None = None) -> dict[str, float]:
    """Everything that can be said of a set of rows.

    Args:
        outcomes: of them.
        classes: K, where all rows choose among the same K.

    Returns:
        "rows"; "answers", their tokens; "loss", nats a token, and "perplexity", its exponential; where there is something to
        choose "accuracy" (0 to 1) and "accuracy_stderr", its standard error; with classes "f1_macro" and "matthews".
    """
    answers = float(outcomes.answers_N.sum())
    loss = float(outcomes.loss_N.sum()) / max(answers, 1)
    result = {"rows": len(outcomes.loss_N), "answers": int(answers), "loss": loss, "perplexity": _exponential(loss)}
    choosing = outcomes.chosen_N >= 0
    if choosing.any():
        right_N = (outcomes.chosen_N == outcomes.target_N)[choosing]
        result |= share("accuracy", right_N)
        if classes is not None:
            confusion = confusion_matrix(
                outcomes.target_N[choosing].long(), outcomes.chosen_N[choosing].long(), classes
            )
            result |= {"f1_macro": f1_macro(confusion), "matthews": matthews(confusion)}
    return result


def share(name: str, right_N: Tensor) -> dict[str, float]:
    """The mean of yes and no, and its standard error (that of the sample mean, with N - 1; nan for one row)."""
    rows, mean = len(right_N), float(right_N.double().mean())
    return {name: mean, f"{name}_stderr": math.sqrt(mean * (1 - mean) / (rows - 1)) if rows > 1 else math.nan}


def confusion_matrix(target_N: Tensor, chosen_N: Tensor, classes: int) -> Tensor:
    """(K, K) counts: rows are what is right, columns what was chosen."""
    return torch.bincount(target_N * classes + chosen_N, minlength=classes**2).view(classes, classes).double()


def f1_macro(confusion_KK: Tensor) -> float:
    """The mean over classes, of those that are right or chosen somewhere, of 2 TP / (2 TP + FP + FN)."""
    both_K = confusion_KK.sum(0) + confusion_KK.sum(1)
    seen = both_K > 0
    return float((2 * confusion_KK.diagonal()[seen] / both_K[seen]).mean())


def matthews(confusion_KK: Tensor) -> float:
    """The correlation coefficient for K classes (Gorodkin 2004), from -1 to 1; 0 where all rows are of one class, or all are
    taken for one."""
    rows, right = confusion_KK.sum(), confusion_KK.trace()
    target_K, chosen_K = confusion_KK.sum(1), confusion_KK.sum(0)
    spread = (rows**2 - (chosen_K**2).sum()) * (rows**2 - (target_K**2).sum())
    return float((right * rows - (target_K * chosen_K).sum()) / spread.sqrt()) if spread > 0 else 0.0


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
