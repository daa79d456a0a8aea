"""Train LD-MoLE with Hugging Face's `Trainer` and its subclasses, such as TRL's `SFTTrainer`, `DPOTrainer` and `GRPOTrainer`.

A `Trainer` does not compute the auxiliary losses of LD-MoLE. `AuxiliaryLosses` adds them to the task loss in `compute_loss`,
before the loss is scaled for gradient accumulation and mixed precision. The auxiliary losses are averaged over the forwards
with gradients of a micro-batch, over the micro-batches of an optimizer step and over processes. Forwards without gradients,
such as those of a reference model and of generation, add nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ldmole_dist.method.context import TERMS, LossWeights
from ldmole_dist.tuner.model import tuner_of

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class AuxiliaryLosses(_Base):
    """Mixin for a `Trainer` subclass that adds the auxiliary losses; list it first.

    For example: `class MyTrainer(AuxiliaryLosses, SFTTrainer): pass`.

    Args:
        auxiliary: coefficients of the auxiliary losses. The default is the paper's: only the load-balancing loss, with
            coefficient 1. The L1 coefficient stays constant, unlike in `ldmole train`.

    Raises:
        ValueError: if the experts are spread over ranks, because a `Trainer` averages every gradient over all ranks; if TRL has
            cast the adapter of a quantized backbone to bfloat16; or if an option of the trainer does not work with LD-MoLE:
            reentrant checkpointing, vLLM, or continuous batching in half precision.
    """

    def __init__(self, *args: Any, auxiliary: LossWeights | None = None, **kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, TrainingArguments):
                _check_options(value)  # now, because TRL's constructor would start vLLM
        super().__init__(*args, **kwargs)
        _check_options(self.args)  # again, because TRL changes some options
        assert self.model is not None  # checked by Trainer's constructor
        tuner = tuner_of(self.accelerator.unwrap_model(self.model))
        if tuner.parallel.size > 1:
            raise ValueError(
                f"the experts are spread over {tuner.parallel.size} ranks, but a Trainer averages their gradients as if every "
                "rank had the same experts; remove the call to spread_experts, or train with `ldmole train`"
            )
        quantized = any(getattr(self.model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
        if quantized and any(p.requires_grad and p.dtype == torch.bfloat16 for p in self.model.parameters()):
            raise ValueError(
                "the adapter of this quantized backbone is in bfloat16, to which TRL casts it, but LD-MoLE routes in float32; "
                "use LdMoleTrainer or `ldmole train`, or load the backbone without quantization"
            )
        self.context = tuner.context
        self.context.weights = auxiliary if auxiliary is not None else LossWeights(balance=1.0)
        self._reported: dict[str, Tensor] = {}  # sums over the forwards since the last log
        self._forwards = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the base class plus, in training, the auxiliary losses of this micro-batch.

        Raises:
            RuntimeError: if the base class computes its loss without a forward of the whole model.
        """
        with self._auxiliary_losses() as collected:
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        if not collected:
            raise RuntimeError(
                f"{type(self).__name__} computed its loss without calling the model itself, so the auxiliary losses are not "
                "known; turn off the option that calls only a part of the model, such as a fused loss"
            )
        loss, outputs = result if return_outputs else (result, None)
        loss = loss + self._micro_batch_weight(num_items_in_batch) * sum(collected) / len(collected)
        return (loss, outputs) if return_outputs else loss

    def _micro_batch_weight(self, num_items_in_batch: Tensor | int | None) -> float:
        """Return the weight of a micro-batch's auxiliary losses: 1 divided by the number of micro-batches of the step.

        The weight is 1 if `Trainer.training_step` itself divides the loss by that number.
        """
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            normalised = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = normalised or self.compute_loss_func is not None
        return 1 / self.current_gradient_accumulation_steps if scaled else 1.0

    @contextmanager
    def _auxiliary_losses(self) -> Iterator[list[Tensor | float]]:
        """Yield a list to which each forward with gradients and with the adapter appends its auxiliary loss.

        Other forwards are skipped: those of a reference model, and those that some trainers run for metrics.
        """
        collected: list[Tensor | float] = []

        def collect(*_: Any) -> None:
            if torch.is_grad_enabled() and self.context.stats:
                collected.append(self.context.auxiliary_loss())
                self._accumulate_metrics()

        assert self.model is not None
        handle = self.accelerator.unwrap_model(self.model).register_forward_hook(collect)
        try:
            yield collected
        finally:
            handle.remove()

    @torch.no_grad()
    def _accumulate_metrics(self) -> None:
        active, lam, decisions = torch.stack(list(self.context.stats.values())).sum(0)
        values = {
            f"loss_{term}": torch.as_tensor(self.context.mean(term)) for term in TERMS if term in self.context.terms
        }
        values |= {"experts_per_token": active / decisions, "lambda_mean": lam / decisions}
        for name, value in values.items():
            self._reported[name] = self._reported.get(name, torch.zeros_like(value)) + value.detach()
        self._forwards += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the metrics of the base class, the auxiliary losses, the active experts per token and lambda.

        The added metrics are means over forwards and processes since the last log of training. The auxiliary losses are logged
        without their coefficients.
        """
        assert self.model is not None
        if self._forwards and self.model.training:
            sums = torch.stack(list(self._reported.values())) / self._forwards
            means = self.accelerator.reduce(sums, "mean").tolist()
            # Leave out NaN: the mean lambda of a router without lambda.
            logs |= {name: mean for name, mean in zip(self._reported, means, strict=True) if mean == mean}
            self._reported, self._forwards = {}, 0
        super().log(logs, *args, **kwargs)


class LdMoleTrainer(AuxiliaryLosses, Trainer):
    """Hugging Face's `Trainer` with the auxiliary losses of LD-MoLE; see `AuxiliaryLosses` for the additional argument."""


def _check_options(args: TrainingArguments) -> None:
    """Raise ValueError if an option of a trainer does not work with LD-MoLE. TRL's options are checked where they exist."""
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise ValueError(
            "use_reentrant=True silently drops the gradient of the auxiliary losses; remove it from "
            "gradient_checkpointing_kwargs. TRL sets it for every PEFT model under ZeRO-3: there, train with `ldmole train`"
        )
    if getattr(args, "use_vllm", False):
        raise ValueError(
            "use_vllm=True does not work with LD-MoLE: TRL merges the adapter into the weights that it sends to vLLM, but each "
            "token has its own mixture of experts; set use_vllm=False, with use_transformers_continuous_batching=True if "
            "generation is slow"
        )
    if getattr(args, "use_transformers_continuous_batching", False) and (args.bf16 or args.fp16):
        raise ValueError(
            "use_transformers_continuous_batching=True with bf16 or fp16 casts the routers and lambda-MLPs to half precision, "
            "but LD-MoLE routes in float32; set bf16=False and fp16=False and load the backbone in bfloat16, or set "
            "use_transformers_continuous_batching=False"
        )
