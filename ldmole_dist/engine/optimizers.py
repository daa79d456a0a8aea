"""Create the optimizer and the learning-rate schedule that a config names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldmole_dist.config import Optimisation


def make_optimizer(o: Optimisation, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return AdamW for parameter groups, in the implementation that `o.optimizer` names."""
    settings: dict[str, Any] = dict(lr=o.learning_rate, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps)
    if o.optimizer == "fused_adam":
        from deepspeed.ops.adam import FusedAdam  # compiles its kernels when it is created, unless they are prebuilt

        return FusedAdam(groups, adam_w_mode=True, **settings)
    if o.optimizer == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, **settings)


def make_scheduler(o: Optimisation, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Return a learning-rate scheduler: linear warm-up, then the schedule that `o.schedule` names."""

    def factor(step: int) -> float:
        if step < o.warmup_steps:
            return (step + 1) / (o.warmup_steps + 1)
        if o.schedule == "cosine":
            progress = (step - o.warmup_steps) / max(1, total_steps - o.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if o.schedule == "multistep":
            return o.gamma ** sum(step >= share * total_steps for share in o.milestones)
        return 1.0

    return LambdaLR(optimizer, factor)
