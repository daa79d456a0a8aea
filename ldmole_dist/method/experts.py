"""The LoRA experts of one linear, y = s * sum_e p_e(x) B_e A_e x (paper, section 3), in two equivalent formulations.

fused:  concatenates the experts: h = x A_cat^T, h weighted by p, then one product with B_cat. Needs no device synchronization,
        but computes inactive experts too. Saves x, p and h (T, L R) for the backward.
sparse: for each expert, gathers its active rows, computes two small products and adds the result to the output with
        index_add. Saves x, p, and h of the active pairs only.

Unlike the einsum of the authors' code, neither builds a (T, L, O) tensor. Which one is faster depends on L R / k and on the
device (docs/method.md; measure it with `ldmole bench layer`).

Shapes: T tokens, D in-features, O out-features, L experts held by this process, R LoRA rank, N active (token, expert) pairs,
k = N / T active experts per token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldmole_dist.method.autocast import backward_without_autocast
from ldmole_dist.method.sparsegen import at_least_float32

# On a CPU in float32, fused is faster at L R / k = 32 and sparse at 128 (docs/results/cpu.md). The threshold is an estimate
# between the two.
FUSED_THRESHOLD_ON_CPU = 115


class ExpertBank(NamedTuple):
    """The experts of one linear that this process holds.

    Args:
        A_LRD: down projections, (L, R, D).
        B_LOR: up projections, (L, O, R).
        scaling: s, which is alpha / r, or alpha / sqrt(r) with use_rslora.
    """

    A_LRD: Tensor
    B_LOR: Tensor
    scaling: float


def fused_threshold(on_cpu: bool) -> int:
    """Return the largest L R / k at which the fused formulation is faster than the sparse one."""
    # On an accelerator the sparse formulation is bound by kernel launches. On an H200, its forward and backward take 0.6 to
    # 0.75 ms per expert; those of fused take 1.2 ms in total for 8 or 32 experts (docs/results/h200.md). So always use fused.
    return FUSED_THRESHOLD_ON_CPU if on_cpu else sys.maxsize


def fused_is_always_faster(bank: ExpertBank) -> bool:
    """Return whether fused is faster for every k >= 1, so that the experts' token counts are not needed."""
    num_experts, lora_rank, _ = bank.A_LRD.shape
    return num_experts * lora_rank <= fused_threshold(bank.A_LRD.device.type == "cpu")


def apply_experts(x_TD: Tensor, p_TL: Tensor, bank: ExpertBank, counts_L: list[int] | None) -> Tensor:
    """Return the weighted sum of the experts for every token, by the formulation that is faster for these counts.

    Args:
        x_TD: (T, D) in the dtype to compute in; T may be 0.
        p_TL: (T, L) routing weights, 0 for inactive experts.
        bank: experts, in any floating dtype; their gradients have the same dtype.
        counts_L: number of active tokens of each expert; None if they are unknown, which selects fused.

    Returns:
        (T, O) in the dtype of x.
    """
    num_experts, lora_rank, _ = bank.A_LRD.shape
    threshold = fused_threshold(x_TD.device.type == "cpu")
    # L R / k <= threshold with k = sum(counts) / T, without the division: T and the counts may be 0.
    if counts_L is None or num_experts * lora_rank * x_TD.shape[0] <= threshold * sum(counts_L):
        return fused_experts(x_TD, p_TL, bank)
    return sparse_experts(x_TD, p_TL, bank, counts_L)


def fused_experts(x_TD: Tensor, p_TL: Tensor, bank: ExpertBank) -> Tensor:
    """Compute `apply_experts` as two products over all experts at once."""
    return _Fused.apply(x_TD, p_TL, bank.A_LRD, bank.B_LOR, bank.scaling)


def sparse_experts(x_TD: Tensor, p_TL: Tensor, bank: ExpertBank, counts_L: list[int]) -> Tensor:
    """Compute `apply_experts` over the active pairs only; `counts_L` must be the column sums of `p_TL != 0`."""
    return _Sparse.apply(x_TD, p_TL, bank.A_LRD, bank.B_LOR, bank.scaling, counts_L)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        h = x @ A.to(x.dtype).flatten(0, 1).t()
        ctx.save_for_backward(x, p, A, B, h)
        ctx.scaling = scaling
        return _weighted(h, p, scaling) @ _B_cat(B, x.dtype)

    @staticmethod
    @backward_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, None]:
        x, p, A, B, h = ctx.saved_tensors
        num_experts, lora_rank, _ = A.shape
        grad_hp = grad @ _B_cat(B, grad.dtype).t()  # (T, L R)
        wide = p.dtype
        grad_p = (grad_hp.to(wide) * h.to(wide)).unflatten(1, (num_experts, lora_rank)).sum(-1) * ctx.scaling
        grad_h = _weighted(grad_hp, p, ctx.scaling)
        grad_x = grad_h @ A.to(x.dtype).flatten(0, 1) if ctx.needs_input_grad[0] else None
        grad_A = grad_B = None
        if ctx.needs_input_grad[2]:  # A and B are trained or frozen together
            grad_A = (grad_h.t() @ x).view_as(A).to(A.dtype)
            grad_LRO = (_weighted(h, p, ctx.scaling).t() @ grad).view(num_experts, lora_rank, -1)
            grad_B = grad_LRO.transpose(1, 2).to(B.dtype)
        return grad_x, grad_p, grad_A, grad_B, None


def _B_cat(B: Tensor, dtype: torch.dtype) -> Tensor:
    """Concatenate the experts' up projections: (L, O, R) -> (L R, O)."""
    return B.to(dtype).transpose(1, 2).flatten(0, 1)


def _weighted(h: Tensor, p: Tensor, scaling: float) -> Tensor:
    """Multiply each expert's part of h (T, L R) by its routing weight and the scaling."""
    # Scale p, which is at least float32, before it is rounded to the dtype of h.
    weights = (p * scaling).to(h.dtype)
    return (h.unflatten(1, (p.shape[1], -1)) * weights.unsqueeze(-1)).flatten(1)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, A: Tensor, B: Tensor, scaling: float, counts: list[int]) -> Tensor:
        # Sum over experts in at least float32: with many active experts, half precision would round small terms away.
        y = x.new_zeros(x.shape[0], B.shape[1], dtype=at_least_float32(x.dtype))
        h = x.new_empty(sum(counts), A.shape[1])
        for expert, pairs, tokens in _segments(p, counts):
            torch.mm(x[tokens], A[expert].to(x.dtype).t(), out=h[pairs])
            weights = (p[tokens, expert] * scaling).to(x.dtype).unsqueeze(-1)
            y.index_add_(0, tokens, ((h[pairs] * weights) @ B[expert].to(x.dtype).t()).to(y.dtype))
        ctx.save_for_backward(x, p, A, B, h)
        ctx.scaling, ctx.counts = scaling, counts
        return y.to(x.dtype)

    @staticmethod
    @backward_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None, None]:
        x, p, A, B, h = ctx.saved_tensors
        grad_x = x.new_zeros(x.shape, dtype=at_least_float32(x.dtype))
        grad_p = torch.zeros_like(p)
        trained = ctx.needs_input_grad[2]  # A and B are trained or frozen together
        grad_A, grad_B = (torch.zeros_like(bank) if trained else None for bank in (A, B))
        for expert, pairs, tokens in _segments(p, ctx.counts):
            grad_y, h_e = grad[tokens], h[pairs]
            grad_hp = grad_y @ B[expert].to(x.dtype)
            weights = (p[tokens, expert] * ctx.scaling).to(x.dtype).unsqueeze(-1)
            grad_p[tokens, expert] = (grad_hp.to(p.dtype) * h_e.to(p.dtype)).sum(-1) * ctx.scaling
            grad_h = grad_hp * weights
            if grad_A is not None and grad_B is not None:
                grad_A[expert] = grad_h.t() @ x[tokens]
                grad_B[expert] = grad_y.t() @ (h_e * weights)
            grad_x.index_add_(0, tokens, (grad_h @ A[expert].to(x.dtype)).to(grad_x.dtype))
        return grad_x.to(x.dtype), grad_p, grad_A, grad_B, None, None


def _segments(p: Tensor, counts: list[int]) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield (expert, its slice of the active pairs, its tokens) for each expert with tokens, without a synchronization."""
    tokens_N = torch.nonzero_static(p.t() != 0, size=sum(counts))[:, 1]
    start = 0
    for expert, count in enumerate(counts):
        if count:
            pairs = slice(start, start + count)
            yield expert, pairs, tokens_N[pairs]
        start += count
