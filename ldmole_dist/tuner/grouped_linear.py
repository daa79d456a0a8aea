"""The frozen product of routed experts: each row times the weight of its base expert, with the rows sorted by base expert.

Shapes: N rows, D in-features, O out-features, J base experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldmole_dist.method.autocast import backward_without_autocast


def grouped_linear(x_ND: Tensor, weight: Tensor, ends_J: Tensor, transposed: bool) -> Tensor:
    """Return the product of each row with the frozen weight of its base expert, differentiable in the rows.

    Like `nn.Linear`, the function saves the weight itself for the backward. A saved view of the weight would, under ZeRO-3,
    keep the gathered weights of all layers allocated. The product is computed in the dtype of the weight, as by transformers'
    `grouped_mm`.

    Args:
        x_ND: rows in any floating dtype, sorted by base expert.
        weight: (J, O, D), or (J, D, O) if `transposed`.
        ends_J: (J,) int32, cumulative number of rows: base expert j has rows `ends_J[j - 1]` to `ends_J[j] - 1`.
        transposed: whether the weights are stored transposed.

    Returns:
        (N, O) in the dtype of the weight.

    Raises:
        ValueError: if the weight requires a gradient, which is not computed.
    """
    if weight.requires_grad:
        raise ValueError(
            "the base experts under an LD-MoLE adapter must stay frozen; call requires_grad_(False) on them"
        )
    return _GroupedLinear.apply(x_ND, weight, ends_J, transposed)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(weight, ends)
        ctx.dtype, ctx.transposed = x.dtype, transposed
        return _grouped_product(x.to(weight.dtype), weight if transposed else weight.transpose(1, 2), ends)

    @staticmethod
    @backward_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, ends = ctx.saved_tensors
        by_output = weight.transpose(1, 2) if ctx.transposed else weight
        return _grouped_product(grad.contiguous(), by_output, ends).to(ctx.dtype), None, None, None


def _grouped_product(x_ND: Tensor, weight_JDO: Tensor, ends_J: Tensor) -> Tensor:
    sizes = weight_JDO.shape[1:]
    # torch's kernel does not support float64, and needs rows whose size is a multiple of 16 bytes.
    if x_ND.dtype != torch.float64 and all(size * x_ND.element_size() % 16 == 0 for size in sizes):
        return F.grouped_mm(x_ND.contiguous(), weight_JDO, offs=ends_J)
    y_NO = x_ND.new_empty(len(x_ND), weight_JDO.shape[2])
    start = 0
    for weight_DO, end in zip(weight_JDO, ends_J.tolist(), strict=True):
        torch.mm(x_ND[start:end], weight_DO, out=y_NO[start:end])
        start = end
    return y_NO
