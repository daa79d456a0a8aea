"""What an adapter must do on a backbone.

The checks know no method: they also run with PEFT's LoRA on the same targets, and a check that LoRA fails too is not a fault of
LD-MoLE. A check raises on failure. The checks of one architecture share the models of a `Trial`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from ldmole_dist import LdMoleConfig, LossWeights, tuner_of
from ldmole_dist.tuner.model import LdMoleModel
from tests.backbones.sizes import Architecture, Batch

WEIGHTS = LossWeights(balance=0.5, sparsity=0.3, z=0.1)
TOLERANCE = 1e-5  # relative, of float32 results that are computed twice
PREFIX = "base_model.model."


def ld_mole(backbone: PreTrainedModel, architecture: Architecture) -> PeftModel:
    """Return the backbone with an LD-MoLE adapter, in which B is not 0 and the routing is sparse."""
    model = get_peft_model(backbone, LdMoleConfig(num_experts=4, lambda_hidden=8, **_targets(architecture)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".router." in name:
                parameter.mul_(4)
    tuner_of(model).context.weights = WEIGHTS
    return _move(model)


def lora(backbone: PreTrainedModel, architecture: Architecture) -> PeftModel:
    """Return the backbone with a LoRA adapter in which B is not 0."""
    return _move(get_peft_model(backbone, LoraConfig(**_targets(architecture))))


def _targets(architecture: Architecture) -> dict[str, Any]:
    exclude = architecture.exclude
    return dict(
        r=2, lora_dropout=0.0, task_type=architecture.task, target_modules="all-linear", exclude_modules=exclude
    )


def _move(model: PeftModel) -> PeftModel:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name.split("."):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


class Trial:
    """A method on one architecture, with the results that several checks read; each is computed when it is first read.

    Args:
        architecture: the architecture.
        method: adds an adapter to a backbone.
    """

    def __init__(self, architecture: Architecture, method: Callable[..., PeftModel] = ld_mole) -> None:
        self.architecture, self.method = architecture, method
        self.batch = architecture.batch()
        backbone = architecture.model()
        self.plain = self.logits(backbone)
        self.model = method(backbone, architecture)

    def logits(self, model: Any) -> Tensor:
        """Return the logits of the batch, in evaluation mode."""
        with torch.no_grad():
            return model.eval()(**self.batch).logits

    @cached_property
    def trained(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Loss of a training forward and the gradients (`gradients`)."""
        return gradients(self.model, self.batch)

    @cached_property
    def trained_modules(self) -> dict[str, float]:
        """The largest gradient of B of each module that has one, by the name of the module in the backbone."""
        largest: dict[str, float] = {}
        for name, gradient in self.trained[1].items():
            if "lora_B" in name.split(".") and gradient is not None:
                module = re.split(r"\.(?:ldmole_adapters|lora_B)\.", name.removeprefix(PREFIX))[0].removesuffix(
                    ".base_layer"
                )
                largest[module] = max(largest.get(module, 0.0), float(gradient.abs().max()))
        return largest

    @property
    def adapted(self) -> dict[str, Any]:
        """The adapted modules by their names in the backbone."""
        named = self.model.named_modules()
        return {name.removeprefix(PREFIX): module for name, module in named if isinstance(module, BaseTunerLayer)}


def gradients(model: PeftModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return the loss of a training forward, auxiliary losses included, and the gradient of each trainable parameter."""
    loss = model.train()(**batch).loss
    if isinstance(model.base_model, LdMoleModel):
        loss = loss + tuner_of(model).context.auxiliary_loss()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert loss.isfinite(), f"the loss is {loss}"
    bad = [name for name, gradient in found.items() if gradient is not None and not gradient.isfinite().all()]
    assert not bad, f"the gradients of {bad} are not finite"
    return loss.detach(), found


def disabled(trial: Trial) -> None:
    """Check that the backbone's output is the same with a disabled adapter as before the injection.

    Not bit for bit: vectorized functions such as exp round by the alignment of their input.
    """
    with trial.model.disable_adapter():
        bare = trial.logits(trial.model)
    assert torch.allclose(bare, trial.plain, rtol=0, atol=1e-6 * trial.plain.abs().max()), "disabled adapters act"
    assert (trial.logits(trial.model) - bare).abs().max() > 1e-4 * bare.abs().max(), "the adapter changes nothing"


def saved(trial: Trial) -> None:
    """Check that a saved adapter gives the same output when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        trial.model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(trial.architecture.model(), folder)
    assert trial.logits(loaded).equal(trial.logits(trial.model)), "the output of the loaded adapter differs"


def checkpointing(trial: Trial) -> None:
    """Check that loss and gradients are the same with activation checkpointing."""
    if not trial.model.get_base_model().supports_gradient_checkpointing:
        return
    loss, expected = trial.trained
    trial.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        again, found = gradients(trial.model, trial.batch)
    finally:
        trial.model.get_base_model().gradient_checkpointing_disable()
    assert (again - loss).abs() <= TOLERANCE * loss.abs(), f"the loss is {again}, without checkpointing {loss}"
    for name, value in expected.items():
        other = found[name]
        assert (other is None) == (value is None), f"{name} has a gradient in only one of the two"
        if value is not None and other is not None:
            difference = (other - value).norm()
            assert difference <= TOLERANCE * value.norm() + 1e-9, f"{name} differs by {difference} of {value.norm()}"


def cache(trial: Trial) -> None:
    """Check that `generate` gives the same logits with and without a key-value cache, where the backbone does."""
    if trial.architecture.prompt is None:
        return
    inputs = trial.architecture.prompt()

    def difference() -> float:
        settings: dict[str, Any] = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
        settings |= dict(return_dict_in_generate=True, output_logits=True)
        runs = [trial.model.eval().generate(**inputs, use_cache=cached, **settings) for cached in (True, False)]
        first, second = (torch.stack(run.logits) for run in runs)
        return float((first - second).abs().max() / second.abs().max())

    found = difference()
    if found > 1e-4:
        with trial.model.disable_adapter():
            bare = difference()
        assert bare > 1e-4, f"logits with and without a cache differ by {found}, those of the backbone by {bare}"


def bf16(trial: Trial) -> None:
    """Check that loss and gradients on a bfloat16 backbone are finite."""
    dtype = torch.bfloat16
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in trial.batch.items()}
    gradients(trial.method(trial.architecture.model(dtype), trial.architecture), batch)


CHECKS: dict[str, Callable[[Trial], None]] = {
    check.__name__: check for check in (disabled, saved, checkpointing, cache, bf16)
}
