"""DeepSpeed engine for a model with LD-MoLE adapters, with the same interface at every ZeRO stage."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import PeftModel
from torch import Tensor

from ldmole_dist.config import Optimisation
from ldmole_dist.engine.ds_config import stage_of
from ldmole_dist.engine.experts import check_partition_groups, clip_local_gradients, mark_experts, optimizer_groups
from ldmole_dist.engine.loss_scale import use_loss_scale
from ldmole_dist.engine.optimizers import make_optimizer, make_scheduler
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.tuner.layer import LdMoleLayer
from ldmole_dist.tuner.model import tuner_of


class Engine:
    """A DeepSpeed engine around a PEFT model with LD-MoLE adapters. Collective: every rank must create one.

    Args:
        model: PEFT model with its adapter injected. All ranks must have the same parameters, except for the experts, of which
            each rank of an expert-parallel group has its own.
        ds_config: complete config from `resolve_ds_config`.
        optimisation: optimizer, learning-rate schedule and gradient clipping.
        total_steps: number of optimizer steps of the run, for the learning-rate schedule.

    Attributes:
        module: the model.
        stage: ZeRO stage.
        parallel: expert-parallel group of the model.
        deepspeed: the wrapped DeepSpeed engine.
        grad_norm: gradient norm of the last optimizer step, over the parameters of all ranks, before clipping; infinite if
            DeepSpeed skipped the step.
    """

    def __init__(
        self,
        model: PeftModel,
        ds_config: dict[str, Any],
        optimisation: Optimisation,
        total_steps: int = 1,
    ) -> None:
        self.stage = stage_of(ds_config)
        tuner = tuner_of(model)
        self.parallel: ExpertParallel = tuner.parallel
        self.max_grad_norm = optimisation.max_grad_norm
        self.grad_norm = 0.0
        self._may_overflow = False
        # Trainable parameters are float32 in every precision, so DeepSpeed must treat the run as float32.
        ds_config = dict(ds_config)
        fp16 = ds_config.pop("fp16", None)
        self._scales_losses = fp16 is not None
        self._clips_itself = self.stage == 0
        ep_size = self.parallel.size
        mark_experts(model, max(model.active_peft_config.expert_counts), ep_size, self.stage)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            config=ds_config,
            optimizer=make_optimizer(optimisation, optimizer_groups(model, ep_size, self.stage)),
            lr_scheduler=lambda optimizer: make_scheduler(optimisation, optimizer, total_steps),
            dist_init_required=False,
        )
        self.module = model
        if fp16 is not None:
            use_loss_scale(self.deepspeed.optimizer, fp16)
        if self.stage == 3:
            check_partition_groups(model, ep_size)
            register_experts_of_linears(model)
            tuner.gather_parameter = gathered_parameter

    def __call__(self, **batch: Tensor) -> Any:
        """Run the forward of the model. Collective: every rank must call it the same number of times."""
        return self.deepspeed(**batch)

    def backward(self, loss: Tensor) -> None:
        """Run the backward of a micro-batch. DeepSpeed averages gradients over ranks and micro-batches. Collective."""
        self.deepspeed.backward(loss)

    def step(self) -> None:
        """Finish a micro-batch; after the last one of an optimizer step, clip the gradients and update the parameters.

        At ZeRO stages 1 to 3, DeepSpeed skips the update if gradients are non-finite. Collective: every rank must
        call it after each micro-batch.
        """
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        if boundary and self._clips_itself:
            self.grad_norm = clip_local_gradients(self.module, self.max_grad_norm, self.parallel)
        scaler = self.deepspeed.optimizer.loss_scaler if self._scales_losses else None
        self._may_overflow = scaler is not None and scaler.dynamic and scaler.cur_scale > scaler.min_scale
        self.deepspeed.step()
        if boundary and not self._clips_itself:
            self.grad_norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
            if getattr(self.deepspeed.optimizer, "overflow", False):
                self.grad_norm = math.inf  # DeepSpeed has skipped the update

    @property
    def overflowed(self) -> bool:
        """Whether the last step was skipped because fp16 gradients overflowed and a lower loss scale can prevent that.

        False in the other precisions and at a fixed or minimum loss scale. There, non-finite gradients are an error.
        """
        return self._may_overflow and not math.isfinite(self.grad_norm)

    @property
    def skipped_steps(self) -> int:
        """Number of optimizer steps skipped since the start of the run, including those before a resume."""
        return int(self.deepspeed.skipped_steps)

    @property
    def loss_scale(self) -> float:
        """Factor by which the loss and, until `step`, the gradients are multiplied; 1 except in fp16."""
        return float(self.deepspeed.optimizer.loss_scaler.cur_scale) if self._scales_losses else 1.0

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        return float(self.deepspeed.optimizer.param_groups[0]["lr"])


def register_experts_of_linears(model: PeftModel) -> None:
    """Register the experts of each input group with the group's first linear, under ZeRO-3.

    ZeRO-3 gathers a module's own parameters when its forward starts. The first linear of a group computes the experts of all
    linears of the group, and the forward of the modules that hold these experts is not called.
    """
    for module in model.modules():
        if isinstance(module, LdMoleLayer):
            for adapter, group in module.groups.items():
                if group.linears[0] is module:
                    for member in group.linears:
                        deepspeed.zero.register_external_parameter(module, member.ldmole_adapters[adapter].lora_A)
                        deepspeed.zero.register_external_parameter(module, member.ldmole_adapters[adapter].lora_B)


def gathered_parameter(parameter: Tensor) -> Tensor:
    """Return a detached copy of the full tensor of a parameter that ZeRO-3 may have partitioned.

    For an expert parameter, the full tensor has only the experts of this rank. Collective over the ranks that the parameter is
    partitioned over.
    """
    if not hasattr(parameter, "ds_status") or parameter.ds_status == ZeroParamStatus.AVAILABLE:
        return parameter.detach().clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
