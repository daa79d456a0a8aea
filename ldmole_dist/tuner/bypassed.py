"""Linears whose module is not called, because the code of their parent takes their weight as an operand.

Mamba's fused training kernels take the weight of `out_proj`, where they are installed. An adapter on such a linear would have
no effect in training.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

# A weight counts as an operand if it is an argument or the left side of a matrix product. Not if the function works in place
# (its name ends in "_"), as those that initialize weights, or is `isinstance`: these do not replace the call of the linear.
_OPERAND = re.compile(r"(?<!_\()(?<!isinstance\()self\.(\w+)\.weight(?=,|\)| @ )")


def is_bypassed(parent: nn.Module, name: str) -> bool:
    """Return whether the code of a module may take the weight of its linear `name` instead of calling the linear."""
    kind: Any = type(parent)
    return name in _operands(kind)


@cache
def _operands(kind: Any) -> frozenset[str]:
    try:
        return frozenset(_OPERAND.findall(inspect.getsource(kind)))
    except (OSError, TypeError):  # a class without source, such as one that was typed into an interpreter
        return frozenset()
