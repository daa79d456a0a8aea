"""Forward passes that compute no more logits than their caller needs."""

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
    """Targets and the logits for them; a causal model computes no others (its head is the widest product of a small model).

    Args:
        model: callable as a Hugging Face model, an `Engine` included.
        batch: from `collate` or `pack`.

    Returns:
        (B, S') and (B, S', V), or (B,) and (B, V) for classes.
    """
    inputs: dict[str, Any] = {name: values for name, values in batch.items() if name != "labels"} | {"use_cache": False}
    if batch["labels"].dim() == 1:
        return batch["labels"], model(**inputs).logits
    targets = next_tokens(batch["labels"])
    positions = answer_positions(targets)
    return targets[:, positions], model(**inputs, logits_to_keep=positions).logits


@torch.no_grad()
def route(model: PeftModel, batch: Mapping[str, Tensor], observer: Observer | None) -> None:
    """One forward that shows the routing of every adapted linear to `observer`, and computes no more logits than it must.

    Args:
        model: in evaluation mode.
        batch: from `collate`.
        observer: see `StepContext`.
    """
    base: Any = model.get_base_model()
    inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"use_cache": False}
    # A causal model's head is the widest product of a small model: one position is enough, unless the head is adapted.
    if batch["labels"].dim() == 2 and not isinstance(base.get_output_embeddings(), LdMoleLinear):
        inputs["logits_to_keep"] = 1
    context = tuner_of(model).context
    context.observer = observer
    try:
        model(**inputs)
    finally:
        context.observer = None
