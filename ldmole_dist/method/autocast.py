"""Support of `torch.autocast`: experts compute in the autocast dtype and routers in float32, as with a backbone of that dtype.

Autocast would otherwise choose dtypes inside the autograd functions of this package, in the forward but not in the backward.
`torch.amp.custom_fwd` is no alternative: it fixes the device type when a module is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Return x cast to the autocast dtype. If autocast is disabled or x is float64, return x unchanged."""
    if not _is_on(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context in which operations compute in the dtypes of their arguments.

    Args:
        device: device type, such as "cuda".
    """
    return torch.autocast(device, enabled=False) if _is_on(device) else nullcontext()


def _is_on(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(
        device
    )  # torch has no autocast for the meta device, and would raise


def backward_without_autocast(backward: Callable[..., Any]) -> Any:
    """Decorate the backward of an autograd function so that it runs without autocast, even if it is called within autocast."""

    @wraps(backward)
    def run(ctx: Any, grad: Tensor) -> Any:
        with without_autocast(grad.device.type):
            return backward(ctx, grad)

    return run
