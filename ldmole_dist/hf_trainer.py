"""LD-MoLE inside Hugging Face's Trainer and what is built on it, such as TRL's SFTTrainer, with its auxiliary losses.

The terms of the auxiliary losses are in the graph of every training forward; a Trainer does not know of them. `AuxiliaryLosses`
adds them to what the Trainer computes, before it is scaled for accumulation, for mixed precision or by an engine: whatever
happens to the task's loss happens to them. They are averaged over the micro-batches of an optimizer step and over processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ldmole_dist.method.context import TERMS, LossWeights
from ldmole_dist.tuner.model import tuner_of

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class AuxiliaryLosses(_Base):
    """To be mixed into a Trainer class, before it: `class MyTrainer(AuxiliaryLosses, SFTTrainer): pass`.

    Args:
        auxiliary: coefficients of the losses, that of the L1 loss a fixed one here; the paper's, a balance loss of 1, if none
            are given.

    Raises:
        ValueError: where the experts are spread over ranks: a Trainer averages every gradient over all of them, and those of
            experts must not be.
    """

    def __init__(self, *args: Any, auxiliary: LossWeights | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.model is not None  # Trainer has made or checked it
        tuner = tuner_of(self.accelerator.unwrap_model(self.model))
        if tuner.parallel.size > 1:
            raise ValueError(
                f"the experts are spread over {tuner.parallel.size} ranks, whose gradients a Trainer would average as if they "
                "were copies: leave spread_experts out, or train with `ldmole train`, which knows of them"
            )
        self.context = tuner.context
        self.context.weights = auxiliary if auxiliary is not None else LossWeights(balance=1.0)
        self._reported: dict[str, Tensor] = {}  # sums over micro-batches since the last log
        self._micro_batches = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's own, and in training the auxiliary losses of this micro-batch."""
        with self._auxiliary_of_forwards() as collected:
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        loss, outputs = result if return_outputs else (result, None)
        loss = loss + self._share(num_items_in_batch) * sum(collected)
        return (loss, outputs) if return_outputs else loss

    def _share(self, num_items_in_batch: Tensor | int | None) -> float:
        """What makes a sum over the micro-batches of a step a mean. A loss that is not yet scaled for accumulation is divided
        by their number in `training_step`, and these with it."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            normalised = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = normalised or self.compute_loss_func is not None
        return 1 / self.current_gradient_accumulation_steps if scaled else 1.0

    @contextmanager
    def _auxiliary_of_forwards(self) -> Iterator[list[Tensor | float]]:
        """Collects the auxiliary losses of forwards with gradients: Trainers also run others, for their metrics."""
        collected: list[Tensor | float] = []

        def collect(*_: Any) -> None:
            if torch.is_grad_enabled():
                collected.append(self.context.auxiliary_loss())
                self._note()

        assert self.model is not None
        handle = self.accelerator.unwrap_model(self.model).register_forward_hook(collect)
        try:
            yield collected
        finally:
            handle.remove()

    @torch.no_grad()
    def _note(self) -> None:
        active, lam, decisions = torch.stack(list(self.context.stats.values())).sum(0)
        values = {
            f"loss_{term}": torch.as_tensor(self.context.mean(term)) for term in TERMS if term in self.context.terms
        }
        values |= {"experts_per_token": active / decisions, "lambda_mean": lam / decisions}
        for name, value in values.items():
            self._reported[name] = self._reported.get(name, torch.zeros_like(value)) + value.detach()
        self._micro_batches += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's own, and means since the last time of the auxiliary losses (before their coefficients), of active
        experts per token and of lambda, over all processes."""
        if self._micro_batches:
            sums = torch.stack(list(self._reported.values())) / self._micro_batches
            means = self.accelerator.reduce(sums, "mean").tolist()
            logs |= {name: mean for name, mean in zip(self._reported, means, strict=True) if mean == mean}
            self._reported, self._micro_batches = {}, 0
        super().log(logs, *args, **kwargs)


class LdMoleTrainer(AuxiliaryLosses, Trainer):
    """Hugging Face's Trainer with the auxiliary losses; see `AuxiliaryLosses` for its arguments."""
