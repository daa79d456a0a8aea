"""Forward passes that compute only the logits that are needed.

Shapes: B sequences, S' positions that need logits, V vocabulary size or number of classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ldmole_dist.loss import answer_positions, next_tokens
from ldmole_dist.method.context import Observer
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of


def batch_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run the forward of a batch and return its targets and their logits.

    Args:
        model: Hugging Face model, or an `Engine` around one.
        batch: batch from `collate` or `pack`.

    Returns:
        For a causal model, targets (B, S') and logits (B, S', V) at the positions where at least one sequence has a target; a
        sequence without a target at such a position has -100 there. For a classifier, labels (B,) and logits (B, V).
    """
    inputs: dict[str, Any] = {name: values for name, values in batch.items() if name != "labels"} | {"use_cache": False}
    if batch["labels"].dim() == 1:
        return batch["labels"], model(**inputs).logits
    targets = next_tokens(batch["labels"])
    positions = answer_positions(targets)
    return targets[:, positions], model(**inputs, logits_to_keep=positions).logits


@torch.no_grad()
def observe_routing(model: PeftModel, batch: Mapping[str, Tensor], observer: Observer | None) -> None:
    """Run one forward and pass the routing of every adapted linear to `observer`.

    Args:
        model: model in evaluation mode.
        batch: batch from `collate`.
        observer: function to call with each routing (`StepContext.observer`); None records nothing.
    """
    base: Any = model.get_base_model()
    inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"use_cache": False}
    # The logits are not used, and the output head of a causal model is its largest matrix product, so compute the logits of
    # one position only. If the head is adapted, compute all: its routing is observed at every position.
    if batch["labels"].dim() == 2 and not isinstance(base.get_output_embeddings(), LdMoleLinear):
        inputs["logits_to_keep"] = 1
    context = tuner_of(model).context
    context.observer = observer
    try:
        model(**inputs)
    finally:
        context.observer = None
