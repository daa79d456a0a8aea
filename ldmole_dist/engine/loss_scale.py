"""A loss scale for runs in fp16, whose trainable parameters are float32 like those of every run.

DeepSpeed 0.19.8 scales losses only where the trainable parameters themselves are fp16. Its optimizers use whatever scaler
they hold, though: they scale the loss, unscale the gradients before clipping, and skip a step whose gradients overflowed.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from torch import Tensor


class GrowingLossScaler(DynamicLossScaler):
    """A dynamic loss scale that grows between steps. DeepSpeed's grows before the gradients are unscaled, with the new scale:
    once in `loss_scale_window` steps the update is half of what it should be."""

    cur_scale: float

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.grown = 0.0  # the scale from the next loss on, if it is another

    def update_scale(self, overflow: bool) -> None:
        """After every optimizer step."""
        before = self.cur_scale
        super().update_scale(overflow)
        if self.cur_scale > before:
            self.grown, self.cur_scale = self.cur_scale, before

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Times the current scale."""
        self.cur_scale, self.grown = self.grown or self.cur_scale, 0.0
        return super().scale_loss(loss)


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
    optimizer.loss_scaler = GrowingLossScaler(
        init_scale=2**settings.initial_scale_power,
        scale_window=settings.loss_scale_window,
        min_scale=settings.min_loss_scale,
        delayed_shift=settings.hysteresis,
        consecutive_hysteresis=settings.consecutive_hysteresis,
        raise_error_at_min_scale=False,  # the engine does, and says where (`Engine.overflowed`)
    )
    optimizer.dynamic_loss_scale = True
