"""Load a backbone whose frozen linears are quantized by bitsandbytes (QLoRA, arXiv 2305.14314; LLM.int8, arXiv 2208.07339)."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ldmole_dist.errors import UserError, require_extra
from ldmole_dist.tuner.quantized import is_quantized_linear


def quantized_loading(
    quantization: str, dtype: torch.dtype, device: torch.device | str, partitioned: bool
) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` quantizes a backbone on its way to `device`.

    Args:
        quantization: "nf4" (4-bit NormalFloat with double quantization) or "int8" (LLM.int8).
        dtype: dtype of the activations and of the weights that are not quantized.
        device: device of the loaded weights.
        partitioned: whether ZeRO-3 will partition the weights; 4-bit weights are then stored in tensors of `dtype`.

    Returns:
        Keyword arguments for `from_pretrained`.

    Raises:
        UserError: if bitsandbytes is not installed.
    """
    require_extra("quantization", "bitsandbytes")
    if quantization == "int8":
        # bitsandbytes would warn in each evaluation forward that activations are cast to float16 before they are quantized.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if partitioned else torch.uint8,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def check_quantizable(model: PreTrainedModel, quantization: str) -> None:
    """Check that bitsandbytes can quantize all linears of a model except its output head.

    Args:
        model: model without weights, on the meta device, or with weights that are not quantized.
        quantization: value of backbone.quantization, for the message.

    Raises:
        UserError: if the model has fused experts or convolutions, or a linear of a class that bitsandbytes leaves as it is.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2:
            raise UserError(
                f"backbone.quantization={quantization} does not quantize {name} of this {model.config.model_type} model: only "
                "linears are quantized, not fused experts or convolutions; remove backbone.quantization"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise UserError(
                f"backbone.quantization={quantization} does not quantize {name} of this {model.config.model_type} model, "
                f"because it is a {type(module).__name__} and not an nn.Linear; remove backbone.quantization"
            )


def quantized_bytes(quantization: str, in_features: int, out_features: int) -> int:
    """Return the bytes of the quantized weight of one linear, with its scales and code books, in bitsandbytes 0.50."""
    n = in_features * out_features
    if quantization == "int8":
        return n + 4 * out_features  # a float32 scale per row
    # nf4: blocks of 64 weights with a scale of 8 bits; blocks of 256 scales with a float32 scale; code books of 16 and 256
    # float32 numbers; the float32 mean of the scales.
    blocks = math.ceil(n / 64)
    return math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters of a model, with the scales and code books of quantized ones.

    Parameters that share their storage count once.
    """
    tensors: list[Tensor] = list(model.parameters())
    for module in model.modules():
        if is_quantized_linear(module):
            tensors += _scales(module)
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _scales(linear: Any) -> list[Tensor]:
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return [linear.weight.SCB if linear.state.SCB is None else linear.state.SCB]
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
