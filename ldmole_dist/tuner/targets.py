"""The linears that an adapter config selects in a backbone, which of them can be adapted, and the number of experts of each."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ldmole_dist.config.adapter import LINEARS
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.quantized import is_quantized_linear, why_quantization_fails

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # weights of other dtypes are quantized


def features_of(linear: nn.Module) -> tuple[int, int]:
    """Return the in- and out-features of an `nn.Linear` or of a `Conv1D`, GPT-2's linear with a transposed weight."""
    module: Any = linear
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def why_not_adaptable(module: nn.Module) -> str | None:
    """Return why a module cannot be adapted and what to do about it, as the rest of a sentence; None if it can be adapted.

    LD-MoLE adapts `nn.Linear`, transformers' `Conv1D`, and subclasses of them that map (..., D) to a tensor (..., O); also the
    quantized linears of `tuner.quantized`.
    """
    if reason := why_quantization_fails(module):
        return reason
    if is_quantized_linear(module):
        return None
    if not isinstance(module, (nn.Linear, Conv1D)):
        return "is not a linear; leave it out of target_modules"
    if module.weight.dtype not in DTYPES:
        return f"has weights of {module.weight.dtype}; load the backbone without quantization"
    D, O = features_of(module)
    if type(module) not in (nn.Linear, Conv1D) and not _is_linear_map(module, D, O):
        return f"does not map (..., {D}) to a tensor (..., {O}); leave it out of target_modules"
    return None


def _is_linear_map(module: nn.Module, D: int, O: int) -> bool:
    # Run the forward on the meta device, with new weights of full size: the module's own may be partitioned or on any device.
    sizes = {"weight": (D, O) if isinstance(module, Conv1D) else (O, D), "bias": (O,)}
    weights = {
        name: torch.empty(sizes.get(name, p.shape), dtype=p.dtype, device="meta")
        for name, p in module.named_parameters()
    }
    x = torch.empty(1, D, dtype=weights["weight"].dtype, device="meta")
    try:
        y = functional_call(module, weights, (x,))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    return isinstance(y, Tensor) and y.shape == (1, O)


def default_targets(model: nn.Module, short: bool = False) -> list[str]:
    """Return the names of the linears to adapt if a config names none.

    They are the paper's seven linears of a decoder layer if the model has linears of all these names, otherwise all adaptable
    linears in its numbered layers. In a model without such layers, they are all adaptable linears but heads.

    Args:
        model: the backbone, with or without adapters.
        short: whether to return last parts of names, for `layers_to_transform`, which does not apply to full names.
    """
    linears = [name for name, module in _bare_modules(model).items() if why_not_adaptable(module) is None]
    if {name.rpartition(".")[2] for name in linears}.issuperset(LINEARS):
        return list(LINEARS)
    in_layers = [name for name in linears if re.search(r"\.\d+\.", name)]
    chosen = in_layers or [name for name in linears if name not in SEQ_CLS_HEAD_NAMES]
    return sorted({name.rpartition(".")[2] for name in chosen}) if short else chosen


def _bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the bare backbone by name, whether or not adapters and modules_to_save wrap some of them."""
    return {
        name.removesuffix(".base_layer").replace(".original_module", ""): module
        for name, module in model.named_modules()
        if ".modules_to_save." not in name
    }


def rank_and_scaling(config: LdMoleConfig, name: str) -> tuple[int, float]:
    """Return the LoRA rank r of a linear and the factor s of its experts' output.

    Args:
        config: config of the adapter.
        name: full name of the linear, which `rank_pattern` and `alpha_pattern` are matched against.
    """
    r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
    return r, alpha / (math.sqrt(r) if config.use_rslora else r)


def check_targets_exist(model: nn.Module, config: LdMoleConfig) -> None:
    """Raise ValueError if an entry of `target_modules` matches no module of the model.

    PEFT itself only requires that at least one entry matches. A regular expression is left to PEFT.
    """
    if isinstance(config.target_modules, str) or config.target_modules is None:
        return
    modules = _bare_modules(model)
    unmatched = [t for t in config.target_modules if not any(f".{name}".endswith(f".{t}") for name in modules)]
    if unmatched:
        linears = {name.rsplit(".", 1)[-1] for name, module in modules.items() if why_not_adaptable(module) is None}
        raise ValueError(
            f"target_modules {sorted(unmatched)} match no module of this model; choose from its linears, {sorted(linears)}, "
            "or set target_modules to 'all-linear'"
        )


def check_patterns_match(config: LdMoleConfig, names: Collection[str]) -> None:
    """Raise ValueError if a key of `rank_pattern` or `alpha_pattern` matches none of the adapted linears `names`."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(get_pattern_key([key], name) == key for name in names):
                raise ValueError(
                    f"{field} has the key {key!r}, which matches no adapted linear; choose from {sorted(names)}"
                )


def experts_of_linear(model: nn.Module, config: LdMoleConfig, name: str) -> int:
    """Return E, the number of experts of one adapted linear.

    If `num_experts` is a list of n entries, the decoder layers are divided in order into n groups of equal size, up to
    rounding. Each entry sets how many experts each adapted linear of one group has.

    Args:
        model: the backbone.
        config: config of the adapter.
        name: full name of the linear in the backbone; the first integer in it is the index of its decoder layer.

    Raises:
        ValueError: if `num_experts` is a list of several entries and the linear is not in a decoder layer, or there are fewer
            layers than entries.
    """
    counts = config.expert_counts
    if len(counts) == 1:
        return counts[0]
    layered = re.match(r"(.+?)\.(\d+)\.", name)
    if layered is None:
        raise ValueError(
            f"num_experts={counts} is a list, but {name} is not in a numbered decoder layer; set num_experts to one integer, "
            "or remove this linear from target_modules"
        )
    layers: Any = model.get_submodule(layered[1])
    if len(layers) < len(counts):
        raise ValueError(
            f"num_experts={counts} has {len(counts)} entries, but {layered[1]} has only {len(layers)} layers; give at most "
            "one entry per layer"
        )
    return counts[int(layered[2]) * len(counts) // len(layers)]
