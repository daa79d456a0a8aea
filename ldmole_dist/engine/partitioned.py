"""Loading a backbone in pieces: under ZeRO-3 no rank ever holds it whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@contextmanager
def partitioned_loading(stage: int, precision: str) -> Iterator[None]:
    """Within it `from_pretrained` splits every weight over all ranks as it is read, if `stage` is 3.

    Args:
        stage: of ZeRO.
        precision: "fp32", "bf16" or "fp16": what the frozen weights are kept in.
    """
    if stage < 3:
        yield
        return
    # transformers holds this object by a weak reference only.
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
