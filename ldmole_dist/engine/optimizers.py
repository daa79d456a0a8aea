"""Optimizers by name: torch's AdamW by default, DeepSpeed's own for those who have a compiler."""

from __future__ import annotations

from typing import Any

import torch

from ldmole_dist.config import Optimisation


def make_optimizer(o: Optimisation, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW over parameter groups, in the implementation that the config names."""
    settings: dict[str, Any] = dict(lr=o.learning_rate, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps)
    if o.optimizer == "fused_adam":
        from deepspeed.ops.adam import FusedAdam  # compiles its kernels when it is made

        return FusedAdam(groups, adam_w_mode=True, **settings)
    if o.optimizer == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, **settings)
