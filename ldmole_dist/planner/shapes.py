"""Parameters and input groups of an adapted model, from its config only: the model is built on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ldmole_dist.errors import UserError
from ldmole_dist.method.context import LossWeights
from ldmole_dist.model.backbone import DTYPES, new_adapter
from ldmole_dist.model.quantization import quantized_bytes
from ldmole_dist.planner.layers import in_layer, layer_prefix, rename
from ldmole_dist.planner.presets import explain_build_errors
from ldmole_dist.planner.workload import Workload
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of
from ldmole_dist.tuner.state_dict import is_expert_tensor
from ldmole_dist.tuner.targets import features_of


class Parameter(NamedTuple):
    """A parameter of the adapted model.

    Args:
        name: Name of the parameter.
        elements: Number of elements; for an expert parameter, over all experts.
        expert: Whether it is the A or B of a linear's experts.
        trainable: Whether it belongs to the adapter; the backbone is frozen.
        quantized_bytes: Bytes of the quantized weight with its scales; 0 if it is not quantized.
    """

    name: str
    elements: int
    expert: bool
    trainable: bool
    quantized_bytes: int


class Group(NamedTuple):
    """An input group: adapted linears that read the same tensor.

    Args:
        name: Name of the first linear of the group.
        in_features: In-features, the same for all linears of the group.
        out_features: Out-features of each linear.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]


Named = TypeVar("Named", Parameter, Group)


class Shapes(NamedTuple):
    """All parameters and input groups, in the order of the model."""

    parameters: tuple[Parameter, ...]
    groups: tuple[Group, ...]

    def frozen(self) -> int:
        """Return the number of elements of the backbone."""
        return sum(p.elements for p in self.parameters if not p.trainable)

    def experts(self) -> int:
        """Return the number of elements of all experts."""
        return sum(p.elements for p in self.parameters if p.expert)

    def dense(self) -> int:
        """Return the number of trainable elements that are not experts: routers and lambda-MLPs."""
        return sum(p.elements for p in self.parameters if p.trainable and not p.expert)


def meta_model(workload: Workload, layers: int | None = None) -> PeftModel:
    """Return the adapted model on the meta device, in training mode and with the load-balancing loss.

    Args:
        workload: Backbone and adapter.
        layers: Number of decoder layers; None for the backbone's own number.

    Raises:
        UserError: If the backbone cannot be built or adapted, has a parameter with more than two dimensions, or has a linear
            that is not exactly `nn.Linear`.
    """
    config = copy.deepcopy(workload.backbone)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    adapter = LdMoleConfig(
        num_experts=workload.num_experts,
        r=workload.lora_rank,
        lambda_hidden=workload.lambda_hidden,
        lora_dropout=workload.dropout,
        target_modules=list(workload.target_modules),
        task_type="CAUSAL_LM",
    )
    with torch.device("meta"):
        with explain_build_errors(f"--backbone: a {config.model_type} model with these sizes"):
            backbone = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[workload.precision], attn_implementation="sdpa"
            )
        if name := next((name for name, p in backbone.named_parameters() if p.dim() > 2), None):
            raise UserError(
                f"--backbone: parameter {name} of this {config.model_type} model has more than two dimensions; backbones with "
                "experts of their own or with convolutions are not supported; choose a dense transformer."
            )
        for name, module in backbone.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and type(module) is not nn.Linear:
                raise UserError(
                    f"--backbone: {name} of this {config.model_type} model is a {type(module).__name__}; the planner's counts "
                    "are tested only for backbones whose linears are all nn.Linear; choose such a backbone."
                )
        model = new_adapter(backbone, adapter)
    tuner_of(model).context.weights = LossWeights(balance=1.0)
    return model.train()


def shapes_of(workload: Workload) -> Shapes:
    """Return the parameters and input groups of the whole model."""
    return _shapes_of(replace(workload, seq=16, micro_batch=1, accumulation=1, answer_tokens=None))


@lru_cache(maxsize=32)
def _shapes_of(workload: Workload) -> Shapes:
    depth = workload.backbone.num_hidden_layers
    if depth > 2:
        # PEFT's injection dominates the time, so adapt two layers and repeat the second.
        shallow = meta_model(workload, 2)
        shapes = _deepened(_shapes(shallow, workload), layer_prefix(shallow), depth)
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(workload.backbone)
        if shapes.frozen() == sum(p.numel() for p in bare.parameters()):
            return shapes
    return _shapes(
        meta_model(workload), workload
    )  # at most two layers, or layers that differ, so that none can be repeated


def _shapes(model: PeftModel, workload: Workload) -> Shapes:
    quantized = {} if workload.quantization is None else _quantized_bytes(model, workload.quantization)
    parameters = tuple(
        Parameter(name, p.numel(), is_expert_tensor(name) and p.requires_grad, p.requires_grad, quantized.get(name, 0))
        for name, p in model.named_parameters()
    )
    return Shapes(parameters, tuple(input_groups(model)))


def _quantized_bytes(model: PeftModel, quantization: str) -> dict[str, int]:
    """Return the bytes of each quantized weight, with its scales and code books, by its name.

    bitsandbytes quantizes the weights of all frozen linears, except that of the output head.
    """
    backbone: Any = model.get_base_model()
    head = backbone.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    return {
        f"{name}.weight": quantized_bytes(quantization, *features_of(module))
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def _deepened(shapes: Shapes, prefix: str, depth: int) -> Shapes:
    """Return the shapes of a model with `depth` decoder layers; further layers repeat the second layer of `shapes`."""
    bare_prefix = prefix.removeprefix("base_model.model.")  # input groups carry the names of the model without PEFT
    parameters = tuple(_repeated(shapes.parameters, prefix, depth))
    return Shapes(parameters, tuple(_repeated(shapes.groups, bare_prefix, depth)))


def _repeated(items: Sequence[Named], prefix: str, depth: int) -> Iterator[Named]:
    """Yield the items of a model with two layers; after those of layer 1, yield their copies for layers 2 to depth - 1."""
    second = [item for item in items if in_layer(item.name, prefix, 1)]
    for item in items:
        yield item
        if item is second[-1]:
            for i in range(2, depth):
                yield from (other._replace(name=rename(other.name, prefix, 1, i)) for other in second)


def input_groups(model: PeftModel) -> Iterator[Group]:
    """Yield the input groups of an adapted model, in the order of their first linears."""
    for module in model.modules():
        if isinstance(module, LdMoleLinear):
            (group,) = module.groups.values()
            linears: list[Any] = group.linears
            if linears[0] is module:
                in_features, _ = features_of(module.base_layer)
                yield Group(module.name, in_features, tuple(features_of(m.base_layer)[1] for m in linears))
