"""Numbers from outcomes, against scikit-learn and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from ldmole_dist.evaluation.likelihood import most_likely
from ldmole_dist.evaluation.metrics import Outcomes, measures, training_metrics


def outcomes(chosen: list[int], target: list[int]) -> Outcomes:
    draw = torch.Generator().manual_seed(len(chosen))
    n = len(chosen)
    loss, answers = torch.rand(n, generator=draw).double() * 3, torch.randint(1, 5, (n,), generator=draw).double()
    return Outcomes(loss, answers, torch.zeros(n), torch.tensor(chosen).double(), torch.tensor(target).double())


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_classes_as_scikit_learn_says(classes: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    target, chosen = (torch.randint(0, classes, (40,), generator=draw).tolist() for _ in range(2))
    found = measures(outcomes(chosen, target), classes)
    assert found["accuracy"] == pytest.approx(accuracy_score(target, chosen))
    assert found["f1_macro"] == pytest.approx(f1_score(target, chosen, average="macro"))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(target, chosen))


def test_one_class_only() -> None:
    found = measures(outcomes([1, 1, 1], [1, 1, 1]), 3)
    assert (found["f1_macro"], found["matthews"], found["accuracy_stderr"]) == (1.0, 0.0, 0.0)
    assert measures(outcomes([1, 1], [0, 1]), 2)["matthews"] == matthews_corrcoef([0, 1], [1, 1])


def test_loss_is_by_token_and_errors_by_row() -> None:
    of = outcomes([0, 1, 0, 0], [0, 0, 0, 1])._replace(
        loss_N=torch.tensor([1.0, 2, 3, 4]), answers_N=torch.tensor([1.0, 1, 1, 2])
    )
    found = measures(of)
    assert found["loss"] == pytest.approx(2.0) and found["perplexity"] == pytest.approx(math.exp(2))
    assert (found["rows"], found["answers"], found["accuracy"]) == (4, 5, 0.5)
    assert found["accuracy_stderr"] == pytest.approx(torch.tensor([1.0, 0, 1, 0]).std() / 2)
    assert "f1_macro" not in found


def test_rows_without_choices_are_neither_right_nor_wrong() -> None:
    found = training_metrics(outcomes([-1, 1, -1], [-1, 1, -1]), ["a", "b", None])
    assert found["accuracy"] == 1.0 and "a/accuracy" not in found and found["b/accuracy"] == 1.0
    assert set(found) == {"eval_loss", "accuracy", "a/eval_loss", "b/eval_loss", "b/accuracy"}


def test_the_likeliest_answer_and_that_by_byte() -> None:
    texts = [(" a", " a long answer"), (" ü", " xyz", " é")]
    every = outcomes([-1] * 5, [-1] * 5)._replace(loss_N=torch.tensor([2.0, 5.0, 1.1, 1.5, 1.0]))
    rows, normalised = most_likely(every, texts, [1, 0])
    assert rows.chosen_N.tolist() == [0, 2] and rows.target_N.tolist() == [1, 0]
    assert rows.loss_N.tolist() == [5.0, pytest.approx(1.1)]  # of the right answers
    # 2/1 and 5/13 bytes; 1.1/2, 1.5/3 and 1.0/2: of two alike the first.
    assert normalised.tolist() == [1, 1]
