"""The linears that an adapter config selects in a backbone, and the number of experts of each."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ldmole_dist.tuner.config import LdMoleConfig


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is an `nn.Linear`, not a subclass, with floating-point weights.

    Subclasses are excluded, because quantization libraries use them for packed weights.
    """
    return type(module) is nn.Linear and module.weight.is_floating_point()


def check_targets_exist(model: nn.Module, config: LdMoleConfig) -> None:
    """Raise ValueError if an entry of `target_modules` matches no module of the model.

    PEFT itself only requires that at least one entry matches. A regular expression is left to PEFT.
    """
    if isinstance(config.target_modules, str) or config.target_modules is None:
        return
    modules = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
    unmatched = [t for t in config.target_modules if not any(f".{name}".endswith(f".{t}") for name in modules)]
    if unmatched:
        linears = {name.rsplit(".", 1)[-1] for name, module in modules.items() if is_plain_linear(module)}
        raise ValueError(
            f"target_modules {sorted(unmatched)} match no module of this model; choose from its linears, {sorted(linears)}"
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
