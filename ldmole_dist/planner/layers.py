"""Names of decoder layers. The planner builds a shallow model, which is fast, and repeats its layers under new names."""

from __future__ import annotations

import re

from peft import PeftModel
from torch import nn

from ldmole_dist.tuner.layer import LdMoleLinear


def last_layer(model: PeftModel) -> nn.Module:
    """Return the last decoder layer: the last element of the module list that contains adapted linears."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return next(m for m in lists if any(isinstance(s, LdMoleLinear) for s in m[-1].modules()))[-1]


def layer_prefix(model: PeftModel) -> str:
    """Return the name of the module list of decoder layers, such as "base_model.model.model.layers"."""
    last = last_layer(model)
    return next(name for name, module in model.named_modules() if module is last).rpartition(".")[0]


def rename(name: str, prefix: str, old: int, new: int) -> str:
    """Return the name of a module or parameter with the index of its decoder layer replaced.

    Args:
        name: Name of a module or parameter; returned unchanged if it does not belong to decoder layer `old`.
        prefix: Name of the module list of decoder layers.
        old: Index of the decoder layer to replace.
        new: Index of the decoder layer that replaces it.
    """
    return re.sub(rf"^{re.escape(prefix)}\.{old}(?=\.|$)", lambda _: f"{prefix}.{new}", name)


def in_layer(name: str, prefix: str, index: int) -> bool:
    """Return whether a module or parameter belongs to decoder layer `index`.

    Args:
        name: Name of the module or parameter.
        prefix: Name of the module list of decoder layers.
        index: Index of the decoder layer.
    """
    return name == f"{prefix}.{index}" or name.startswith(f"{prefix}.{index}.")
