"""Train the modules of `modules_to_save` in at least float32, inside a model of any dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from ldmole_dist.method.sparsegen import at_least_float32
from ldmole_dist.tuner.quantized import is_quantized


def check_not_quantized(model: nn.Module, config: PeftConfig) -> None:
    """Raise ValueError if a module of `modules_to_save` is or contains a quantized linear, which cannot be trained."""
    names: Any = getattr(config, "modules_to_save", None) or ()
    for name, module in model.named_modules():
        if name.endswith(tuple(names)) and any(map(is_quantized, module.modules())):
            raise ValueError(
                f"modules_to_save={names} includes {name}, whose weights are quantized and cannot be trained; remove it, or "
                "exclude it from the quantization (llm_int8_skip_modules)"
            )


def train_in_float32(module: nn.Module, keep_output: bool) -> None:
    """Convert the half-precision parameters of a module to float32, and make its forward cast its inputs to float32.

    Unless `keep_output`, the outputs are cast to the previous dtype of the parameters, which the following modules expect. A
    module whose parameters are at least float32 is not changed.

    Args:
        module: trainable copy of a module of the backbone.
        keep_output: whether the outputs stay in float32.
    """
    narrow = {p.dtype for p in module.parameters() if p.dtype != at_least_float32(p.dtype)}
    if not narrow:
        return
    for parameter in module.parameters():
        parameter.data = parameter.data.to(at_least_float32(parameter.dtype))
    module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    if not keep_output:
        module.register_forward_hook(partial(_cast_output, dtype=next(iter(narrow))))


def is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Return whether a module computes the logits of `model`, which should stay in float32.

    Args:
        model: backbone.
        name: name of the module in the backbone.
        module: the module.
    """
    if name in SEQ_CLS_HEAD_NAMES:
        return True
    return isinstance(model, PreTrainedModel) and module is model.get_output_embeddings()


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    dtype = next(module.parameters()).dtype
    return _cast(args, dtype), _cast(kwargs, dtype)


def _cast_output(module: nn.Module, args: tuple[Any, ...], output: Any, dtype: torch.dtype) -> Any:
    return _cast(output, dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)
