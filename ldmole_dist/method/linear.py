"""Linear maps that compute in a given dtype, whatever the dtype of their weights, and their initialization.

Shapes: T tokens, D in-features, O out-features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldmole_dist.method.autocast import backward_without_autocast


class InputDtypeLinear(nn.Linear):
    """nn.Linear that computes in the dtype of its input, whatever the dtype of its weights."""

    def __init__(self, in_features: int, out_features: int, device: torch.device | None = None) -> None:
        super().__init__(in_features, out_features, device=device)

    def reset_parameters(self) -> None:
        """Do nothing: the owner initializes the weights from its own generator, and the global generator must not advance."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map, (T, D) -> (T, O) in the dtype of `input`."""
        return linear(input, self.weight, self.bias, input.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x W^T + b computed in `dtype`. The backward uses x and W themselves, so that no copies cast to `dtype` are kept.

    Args:
        x: (T, D) in any floating dtype; its gradient has the same dtype.
        weight: (O, D) in any floating dtype; its gradient has the same dtype.
        bias: (O,) or None.
        dtype: dtype of the product and of the result.

    Returns:
        (T, O) in `dtype`.
    """
    return _Linear.apply(x, weight, bias, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @backward_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad.t() @ x.to(grad.dtype)).to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad.sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


@torch.no_grad()
def kaiming_uniform_(weight: Tensor, generator: torch.Generator) -> None:
    """Fill `weight` (..., fan_in) with U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's Kaiming uniform with a = sqrt(5).

    The values are drawn on the CPU, so that every device and rank gets the same values from the same generator state.
    """
    bound = 1 / math.sqrt(weight.shape[-1])
    weight.copy_(torch.empty(weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
