"""Loss and accuracy, overall and by domain, compared with a loop over rows, for several world sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldmole_dist.data.encode import Encoded
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.evaluation.evaluator import Evaluator
from ldmole_dist.loss import IGNORED
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.selftest.reference import build

CHOICES: list[tuple[int, ...] | None] = [(3, 9, 40), (5, 6), (7, 8, 9, 10, 11), None, (3, 4, 5, 6)]


def examples() -> list[Encoded]:
    """Return rows with different lengths and choices and answers of several tokens; every fifth row has no choices."""
    draw = torch.Generator().manual_seed(4)
    rows = []
    for index in range(10):
        ids = torch.randint(12, 60, (4 + 2 * (index % 3),), generator=draw).tolist()
        choices = CHOICES[index % len(CHOICES)]
        answer = [choices[index % len(choices)], 2] if choices else [30, 31]
        labels = [IGNORED] * len(ids) + answer
        rows.append(Encoded(ids + answer, labels, ["long", "short", None][index % 3], choices))
    return rows


def make_model(ep_size: int, first_token: int) -> Any:
    """Return a model whose largest logit is token 0, which is never a choice, in about half of the rows.

    The sign of `first_token` selects the half.
    """
    model: Any = build("llama", torch.float64, expert_parallel(ep_size))
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[0] = first_token * 50 * head[1]
    return model


def evaluated(number: int, ep_size: int, first_token: int) -> dict[str, float]:
    """Evaluate on ranks."""
    return Evaluator(examples()[:number], 0, 3, start())(make_model(ep_size, first_token), "evaluating")


def reference(number: int, first_token: int) -> dict[str, float]:
    """Compute the metrics row by row; run on a rank, because the model needs a process group."""
    model = make_model(1, first_token).eval()
    sums: dict[str | None, list[float]] = {}
    for row in examples()[:number]:
        assert isinstance(row.labels, list)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        places = [i for i, label in enumerate(row.labels) if label != IGNORED]
        loss = -sum(float(logits[i - 1, row.labels[i]]) for i in places)
        right = scored = 0
        if row.choices is not None:
            best = max(row.choices, key=lambda choice: float(logits[places[0] - 1, choice]))
            right, scored = int(best == row.labels[places[0]]), 1
        for key in {"all", row.domain}:
            found = sums.setdefault(key, [0.0] * 4)
            sums[key] = [a + b for a, b in zip(found, (loss, len(places), right, scored), strict=True)]
    result = {}
    for key, (loss, answers, right, scored) in sums.items():
        if key is not None:
            prefix = "" if key == "all" else f"{key}/"
            result[f"{prefix}eval_loss"] = loss / answers
            if scored:
                result[f"{prefix}accuracy"] = right / scored
    return result


@pytest.mark.parametrize(
    ("number", "first_token"), [(10, 1), *(pytest.param(*case, marks=pytest.mark.full) for case in [(10, -1), (3, 1)])]
)
def test_equals_reference(ranks1: LocalRanks, ranks4: LocalRanks, number: int, first_token: int) -> None:
    (expected,) = ranks1.run(reference, number, first_token)
    assert "short/accuracy" in expected and not math.isnan(expected["eval_loss"])
    assert number == 3 or 0 < expected["accuracy"] < 1
    (alone,) = ranks1.run(evaluated, number, 1, first_token)
    assert alone == pytest.approx(expected, abs=1e-9)
    for found in ranks4.run(evaluated, number, 2, first_token):  # with three rows, one of the four ranks has none
        assert found == pytest.approx(expected, abs=1e-9)
