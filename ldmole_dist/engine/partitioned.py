"""Partitioned loading of a backbone under ZeRO-3, so that no device has to hold all weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@contextmanager
def partitioned_loading(stage: int, precision: str) -> Iterator[None]:
    """Context manager: if `stage` is 3, models that transformers creates inside it are partitioned over all ranks.

    Args:
        stage: ZeRO stage.
        precision: dtype of the frozen weights, "fp32", "bf16" or "fp16".
    """
    if stage < 3:
        yield
        return
    # transformers keeps only a weak reference to this object.
    alive = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16"},
        }
    )
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive
