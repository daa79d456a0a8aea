"""Metrics of a model on rows, overall and by domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldmole_dist.data.encode import Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.distributed import raise_on_all_ranks
from ldmole_dist.evaluation.likelihood import choose_by_likelihood
from ldmole_dist.evaluation.metrics import compute_metrics, mean_and_stderr, rows_by_domain
from ldmole_dist.evaluation.model import DistributedModel


def evaluate_rows(model: DistributedModel, encoder: Encoder, rows: Sequence[Row], likelihood: bool) -> dict[str, Any]:
    """Evaluate a model on rows. Collective: every rank must call it.

    Args:
        model: model to evaluate.
        encoder: encoder of the rows.
        rows: all rows, on every rank.
        likelihood: choose the answer by the likelihood of all its tokens, not only of the first one.

    Returns:
        "all": metrics of all rows (`compute_metrics`). "domains": the same metrics for each domain. With `likelihood`, these
        metrics include "accuracy_norm", the accuracy if answers are chosen by log likelihood per byte, and its standard error
        "accuracy_norm_stderr".

    Raises:
        UserError, PeerError: on every rank, if a row cannot be encoded or, with `likelihood`, has no choices.
    """
    quiet = not model.process.is_main
    normalized_N = None
    if likelihood:
        with raise_on_all_ranks("tokenizing"):
            choices = [row.choices or tuple(encoder.labels or ()) for row in rows]
            by_row = [encoder.encode_choices(row) for row in rows]
            targets = [texts.index(row.target) for row, texts in zip(rows, choices, strict=True)]
        sequences = model.outcomes([encoded for row in by_row for encoded in row], "evaluating")
        outcomes, normalized_N = choose_by_likelihood(sequences, choices, targets)
    else:
        with raise_on_all_ranks("tokenizing"):
            encoded = encoder(rows, "tokenizing", quiet)
        outcomes = model.outcomes(encoded, "evaluating")
    # Choices that differ from row to row, such as those of a multiple-choice question, are not classes.
    own_choices = any(row.choices is not None for row in rows)
    classes = None if encoder.labels is None or own_choices else len(encoder.labels)

    def metrics(selected: Sequence[int]) -> dict[str, float]:
        values = compute_metrics(outcomes.select(selected), classes)
        if normalized_N is not None:
            values |= mean_and_stderr("accuracy_norm", normalized_N[selected] == outcomes.target_N[selected])
        return values

    domains = rows_by_domain([row.domain for row in rows])
    return {"all": metrics(range(len(rows))), "domains": {name: metrics(indices) for name, indices in domains.items()}}
