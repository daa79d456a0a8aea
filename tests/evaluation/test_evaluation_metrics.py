"""Metrics of outcomes, compared with scikit-learn and computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from ldmole_dist.evaluation.likelihood import choose_by_likelihood
from ldmole_dist.evaluation.metrics import Outcomes, compute_metrics, training_metrics


def outcomes(chosen: list[int], target: list[int]) -> Outcomes:
    draw = torch.Generator().manual_seed(len(chosen))
    n = len(chosen)
    loss, answers = torch.rand(n, generator=draw).double() * 3, torch.randint(1, 5, (n,), generator=draw).double()
    return Outcomes(loss, answers, torch.zeros(n), torch.tensor(chosen).double(), torch.tensor(target).double())


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_class_metrics_equal_scikit_learn(classes: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    target, chosen = (torch.randint(0, classes, (40,), generator=draw).tolist() for _ in range(2))
    found = compute_metrics(outcomes(chosen, target), classes)
    assert found["accuracy"] == pytest.approx(accuracy_score(target, chosen))
    assert found["f1_macro"] == pytest.approx(f1_score(target, chosen, average="macro"))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(target, chosen))


def test_single_class() -> None:
    found = compute_metrics(outcomes([1, 1, 1], [1, 1, 1]), 3)
    assert (found["f1_macro"], found["matthews"], found["accuracy_stderr"]) == (1.0, 0.0, 0.0)
    assert compute_metrics(outcomes([1, 1], [0, 1]), 2)["matthews"] == matthews_corrcoef([0, 1], [1, 1])


def test_loss_is_per_token_and_stderr_per_row() -> None:
    of = outcomes([0, 1, 0, 0], [0, 0, 0, 1])._replace(
        loss_N=torch.tensor([1.0, 2, 3, 4]), answers_N=torch.tensor([1.0, 1, 1, 2])
    )
    found = compute_metrics(of)
    assert found["loss"] == pytest.approx(2.0) and found["perplexity"] == pytest.approx(math.exp(2))
    assert (found["rows"], found["answers"], found["accuracy"]) == (4, 5, 0.5)
    assert found["accuracy_stderr"] == pytest.approx(torch.tensor([1.0, 0, 1, 0]).std() / 2)
    assert "f1_macro" not in found


def test_rows_without_choices_do_not_count_in_accuracy() -> None:
    found = training_metrics(outcomes([-1, 1, -1], [-1, 1, -1]), ["a", "b", None])
    assert found["accuracy"] == 1.0 and "a/accuracy" not in found and found["b/accuracy"] == 1.0
    assert set(found) == {"eval_loss", "accuracy", "a/eval_loss", "b/eval_loss", "b/accuracy"}


def test_choice_by_likelihood_and_by_likelihood_per_byte() -> None:
    texts = [(" a", " a long answer"), (" ü", " xyz", " é")]
    every = outcomes([-1] * 5, [-1] * 5)._replace(loss_N=torch.tensor([2.0, 5.0, 1.1, 1.5, 1.0]))
    rows, normalized = choose_by_likelihood(every, texts, [1, 0])
    assert rows.chosen_N.tolist() == [0, 2] and rows.target_N.tolist() == [1, 0]
    assert rows.loss_N.tolist() == [5.0, pytest.approx(1.1)]  # of the correct answers
    # 2/1 and 5/13 bytes; 1.1/2, 1.5/3 and 1.0/2: of equal values the first is chosen.
    assert normalized.tolist() == [1, 1]
