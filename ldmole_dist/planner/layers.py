"""Decoder layers by name. Deep models are estimated from shallow ones with the same layers, which are faster to build."""

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
    """Return the name of the list of decoder layers."""
    last = last_layer(model)
    return next(name for name, module in model.named_modules() if module is last).rpartition(".")[0]


def rename(name: str, prefix: str, old: int, new: int) -> str:
    """Return a name with decoder layer `old` replaced by `new`; other names are returned unchanged."""
    return re.sub(rf"^{re.escape(prefix)}\.{old}(?=\.|$)", lambda _: f"{prefix}.{new}", name)


def in_layer(name: str, prefix: str, index: int) -> bool:
    """Return whether a module or parameter belongs to a decoder layer."""
    return name == f"{prefix}.{index}" or name.startswith(f"{prefix}.{index}.")
