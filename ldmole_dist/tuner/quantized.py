"""Quantized linears: which of them can be adapted, and why the others cannot.

Classes are recognized by the package that defines them and their name, so that no quantization package is imported.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

BNB_4BIT, BNB_8BIT, HQQ = "bitsandbytes.Linear4bit", "bitsandbytes.Linear8bitLt", "hqq.HQQLinear"
# Classes of torchao's weights in a plain nn.Linear -> the attribute of a weight that is not None if the linear's input is
# quantized too.
TORCHAO = {
    "torchao.Int8Tensor": "act_quant_kwargs",
    "torchao.Float8Tensor": "act_quant_kwargs",
    "torchao.IntxUnpackedToInt8Tensor": "activation_quantization",
}
HQQ_BACKENDS = ("PYTORCH", "PYTORCH_BACKPROP")
UNTESTED_PACKAGES = (
    "gptqmodel",
    "auto_gptq",
    "awq",
    "aqlm",
    "eetq",
    "neural_compressor",
    "compressed_tensors",
    "optimum",
    "quark",
)
_TESTED = "a linear of bitsandbytes or HQQ, or torchao's int8 or float8 weights"


def is_quantized(module: nn.Module) -> bool:
    """Return whether the weight of a module is quantized, by torchao too."""
    return is_quantized_linear(module) or _is_torchao(getattr(module, "weight", None))


def is_quantized_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear of bitsandbytes or HQQ; False for torchao, whose linears are plain `nn.Linear`."""
    return not {BNB_4BIT, BNB_8BIT, HQQ}.isdisjoint(_classes(module))


def why_quantization_fails(module: nn.Module) -> str | None:
    """Return why a quantized module cannot be adapted and what to do about it, as the rest of a sentence.

    Returns:
        None if the module can be adapted or is not quantized.
    """
    classes, layer = _classes(module), _any(module)
    packages = {name.partition(".")[0] for name in classes}
    if untested := packages.intersection(UNTESTED_PACKAGES):
        return f"is quantized by {untested.pop()}, which is not tested; use {_TESTED}"
    if BNB_4BIT in classes and getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        return "was repacked for inference by an earlier forward, and so computes no gradient; load the backbone again"
    if BNB_8BIT in classes and layer.state.has_fp16_weights:
        return "keeps 16-bit weights (has_fp16_weights=True), which is not tested; load the backbone with load_in_8bit=True"
    if HQQ in classes and layer.backend.name not in HQQ_BACKENDS:
        return f"uses HQQ's backend {layer.backend.name}, which is not tested; use one of {', '.join(HQQ_BACKENDS)}"
    return _why_torchao_fails(getattr(layer, "weight", None))


def _why_torchao_fails(weight: Any) -> str | None:
    classes = _classes(weight)
    if not _is_torchao(weight):
        return None
    known = next((name for name in TORCHAO if name in classes), None)
    if known is None:
        return f"has weights of torchao's {type(weight).__name__}, which is not tested; use {_TESTED}"
    if getattr(weight, TORCHAO[known]) is not None:
        return "quantizes its input too, so that torchao computes no gradient; quantize only its weights"
    return None


def _is_torchao(weight: object) -> bool:
    return any(name.startswith("torchao.") for name in _classes(weight))


def stored_weight(linear: nn.Module) -> Tensor:
    """Return the weight as it is stored, packed if the linear is quantized. Rely only on its device and dtype."""
    return _any(linear).W_q if HQQ in _classes(linear) else _any(linear).weight


def keep_gradients(model: nn.Module) -> None:
    """Prevent the 4-bit linears of bitsandbytes from repacking their weights in forwards without gradients on a CPU.

    On a CPU with bfloat16 instructions, bitsandbytes 0.50 otherwise repacks the weights for a kernel that computes no gradient,
    and later forwards in training use this kernel too.
    """
    for module in model.modules():
        if BNB_4BIT in _classes(module):
            _any(module).support_avx512bf16_for_cpu = False


def _classes(value: object) -> set[str]:
    """Return the class of a value and all base classes, each as "package.Class"."""
    return {f"{each.__module__.partition('.')[0]}.{each.__name__}" for each in type(value).__mro__}


def _any(module: nn.Module) -> Any:
    return module  # nn.Module types every attribute as a tensor or a module
