"""Rows through a model, and everything that can be said of the outcome, of all of them and by domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldmole_dist.data.encode import Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.distributed import raise_on_all_ranks
from ldmole_dist.evaluation.likelihood import most_likely
from ldmole_dist.evaluation.metrics import measures, rows_by_domain, share
from ldmole_dist.evaluation.model import Evaluated


def evaluate_rows(model: Evaluated, encoder: Encoder, rows: Sequence[Row], likelihood: bool) -> dict[str, Any]:
    """Evaluate; every rank calls it.

    Args:
        model: to evaluate.
        encoder: of its data.
        rows: all of them, on every rank.
        likelihood: choose by the likelihood of whole answers, not by their first token.

    Returns:
        "all" and "domains", name -> the same: see `measures`; by likelihood also "accuracy_norm", where the log likelihood is
        divided by the bytes of the answer, and its standard error.

    Raises:
        UserError, PeerError: on every rank, where a row cannot be encoded, or has no choices.
    """
    quiet = not model.process.is_main
    normalised_N = None
    if likelihood:
        with raise_on_all_ranks("tokenising"):
            choices = [row.choices or tuple(encoder.labels or ()) for row in rows]
            alternatives = [encoder.alternatives(row) for row in rows]
            targets = [texts.index(row.target) for row, texts in zip(rows, choices, strict=True)]
        every = model.outcomes([encoded for of_row in alternatives for encoded in of_row], "evaluating")
        outcomes, normalised_N = most_likely(every, choices, targets)
    else:
        with raise_on_all_ranks("tokenising"):
            encoded = encoder(rows, "tokenising", quiet)
        outcomes = model.outcomes(encoded, "evaluating")
    of_own = any(row.choices is not None for row in rows)  # choices that differ from row to row are no classes
    classes = None if encoder.labels is None or of_own else len(encoder.labels)

    def measured(chosen: Sequence[int]) -> dict[str, float]:
        values = measures(outcomes.of(chosen), classes)
        if normalised_N is not None:
            values |= share("accuracy_norm", normalised_N[chosen] == outcomes.target_N[chosen])
        return values

    domains = rows_by_domain([row.domain for row in rows])
    return {"all": measured(range(len(rows))), "domains": {name: measured(chosen) for name, chosen in domains.items()}}
