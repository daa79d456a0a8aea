"""A loss scale for runs in fp16, whose trainable parameters are float32 like those of every run.

DeepSpeed 0.19.8 scales losses only where the trainable parameters themselves are fp16. Its optimizers use whatever scaler
they hold, though: they scale the loss, unscale the gradients before clipping, and skip a step whose gradients overflowed.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.precision_config import DeepSpeedFP16Config


def use_loss_scale(optimizer: Any, fp16: dict[str, Any]) -> None:
    """Give a ZeRO optimizer (stage 1 to 3) a loss scale.

    Args:
        optimizer: of a fresh engine.
        fp16: that section of a DeepSpeed config, with DeepSpeed's defaults: a `loss_scale` of 0 adapts itself.
    """
    settings = DeepSpeedFP16Config(**fp16)
    if settings.loss_scale:
        optimizer.loss_scaler = LossScaler(settings.loss_scale)
        return
    optimizer.loss_scaler = DynamicLossScaler(
        init_scale=2**settings.initial_scale_power,
        scale_window=settings.loss_scale_window,
        min_scale=settings.min_loss_scale,
        delayed_shift=settings.hysteresis,
        consecutive_hysteresis=settings.consecutive_hysteresis,
    )
    optimizer.dynamic_loss_scale = True
