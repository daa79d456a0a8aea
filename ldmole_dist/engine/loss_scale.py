"""Loss scale of fp16 runs, in which trainable parameters are float32 as in every run.

DeepSpeed 0.19.8 scales the loss only if the trainable parameters are fp16. Its ZeRO optimizers work with any scaler that
they are given: they scale the loss, unscale the gradients before clipping, and skip steps whose gradients overflow.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from torch import Tensor


class GrowingLossScaler(DynamicLossScaler):
    """Dynamic loss scaler that raises the scale only between two steps.

    DeepSpeed's own scaler raises the scale before the gradients are unscaled. Once per `loss_scale_window` steps, the gradients
    are therefore divided by twice the scale that the loss was multiplied by.
    """

    cur_scale: float

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.grown = 0.0  # raised scale, pending until the next loss is scaled; 0 if no raise is pending

    def update_scale(self, overflow: bool) -> None:
        """After an overflow, lower the scale immediately, subject to `hysteresis`; defer a raise until the next loss is scaled.

        DeepSpeed's ZeRO optimizers call this inside `step`, before they unscale the gradients.

        Args:
            overflow: whether the gradients of this step are non-finite.
        """
        before = self.cur_scale
        super().update_scale(overflow)
        if self.cur_scale > before:
            self.grown, self.cur_scale = self.cur_scale, before

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss multiplied by the current scale, after applying a pending raise."""
        self.cur_scale, self.grown = self.grown or self.cur_scale, 0.0
        return super().scale_loss(loss)


def use_loss_scale(optimizer: Any, fp16: dict[str, Any]) -> None:
    """Give a ZeRO optimizer (stages 1 to 3) a loss scaler.

    Args:
        optimizer: ZeRO optimizer of an engine that has not stepped yet.
        fp16: section fp16 of a DeepSpeed config; a `loss_scale` of 0 adapts the loss scale during training.
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
        raise_error_at_min_scale=False,  # the trainer raises the error, see Engine.overflowed
    )
    optimizer.dynamic_loss_scale = True
