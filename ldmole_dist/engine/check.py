"""Check a DeepSpeed config with DeepSpeed's own parser."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig

from ldmole_dist.errors import UserError


def check_with_deepspeed(ds_config: dict[str, Any]) -> None:
    """Raise UserError if DeepSpeed's parser rejects a config from `resolve_ds_config`."""
    # The engine applies fp16 itself (engine/loss_scale.py), and train_batch_size needs the world size of the run.
    skipped = ("fp16", "train_batch_size")
    try:
        DeepSpeedConfig({key: value for key, value in ds_config.items() if key not in skipped})
    except Exception as error:  # DeepSpeed raises assertions, ValueError, pydantic's errors and its own
        raise UserError(
            f"DeepSpeed rejects the config of parallelism.deepspeed: {error}; correct this config file"
        ) from error
