"""Decoder layers by name: a deep model repeats those of a shallow one, which is quicker to build and to run."""

from __future__ import annotations

import re

from peft import PeftModel
from torch import nn

from ldmole_dist.tuner.layer import LdMoleLinear


def last_layer(model: PeftModel) -> nn.Module:
    """The last decoder layer: the last element of the list of modules that holds adapted linears."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return next(m for m in lists if any(isinstance(s, LdMoleLinear) for s in m[-1].modules()))[-1]


def layer_prefix(model: PeftModel) -> str:
    """Name of the list of decoder layers."""
    last = last_layer(model)
    return next(name for name, module in model.named_modules() if module is last).rpartition(".")[0]


def rename(name: str, prefix: str, old: int, new: int) -> str:
    """The same place in another decoder layer; names outside layer `old` stay."""
    return re.sub(rf"^{re.escape(prefix)}\.{old}(?=\.|$)", lambda _: f"{prefix}.{new}", name)


def in_layer(name: str, prefix: str, index: int) -> bool:
    """Whether a module or parameter belongs to a decoder layer."""
    return name == f"{prefix}.{index}" or name.startswith(f"{prefix}.{index}.")
