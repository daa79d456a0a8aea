"""Sparsegen: a projection onto the simplex whose sparsity lambda each token chooses for itself.

    p = argmin over the simplex of ||p - u||^2 - lambda ||p||^2,   lambda < 1

Dividing by 1 - lambda > 0 turns it into the Euclidean projection of u / (1 - lambda) (sparsemax), which has a closed form.
Sources: LD-MoLE, arXiv 2509.25684, section 3; Laha et al. 2018, "On Controllable Sparse Alternatives to Softmax".

Shapes: E experts; leading dimensions (usually T tokens) are arbitrary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that routing computes in: half precisions become float32, float64 stays."""
    return torch.promote_types(dtype, torch.float32)


def sparsegen(logits: Tensor, lam: Tensor) -> Tensor:
    """Routing weights of the active experts, exactly 0 for the others; differentiable in both arguments.

    Args:
        logits: (..., E) router scores u, any scale; half precisions are promoted to float32.
        lam: (..., 1) or (...), sparsity below 1: towards 1 one expert, 0 sparsemax, towards -inf all experts alike.
            A value of 1 or more is outside the method and not looked for (it would stall the device);
            `LambdaMLP` cannot produce one.

    Returns:
        (..., E) weights, non-negative, summing to 1 over the last dimension. NaN in a row makes that whole row NaN.

    Source: METHOD equations for k, tau and p_i; Lemma 1 of the paper: at least one expert is active.
    """
    logits, lam = _promoted(logits, lam)
    return sparsegen_on_support(logits, lam, sparsegen_support(logits, lam))


@torch.no_grad()
def sparsegen_support(logits: Tensor, lam: Tensor) -> Tensor:
    """Which experts Sparsegen makes active: the decision alone, without the weights.

    Args:
        logits: (..., E).
        lam: (..., 1) or (...).

    Returns:
        (..., E) bool, at least one True in every row; all True where the row holds a NaN, so that it is not hidden.
    """
    logits, lam = _promoted(logits, lam)
    z = _scaled(logits, lam)
    z_sorted = z.sort(dim=-1, descending=True).values
    prefix = z_sorted.cumsum(dim=-1)
    position = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    k = (1 + position * z_sorted > prefix).sum(dim=-1, keepdim=True).clamp_min(1)
    # Compared with the k-th largest and not with tau: the same rounding then decides the count and the members.
    return ~(z < z_sorted.gather(-1, k - 1))


def sparsegen_on_support(logits: Tensor, lam: Tensor, support: Tensor) -> Tensor:
    """Sparsegen's weights when the active experts are already decided (a recomputation replays its first decision).

    Args:
        logits: (..., E).
        lam: (..., 1) or (...).
        support: (..., E) bool, the active experts.

    Returns:
        (..., E) weights: positive exactly on the support, so `p != 0` gives the support back.
    """
    logits, lam = _promoted(logits, lam)
    return _SparsegenOnSupport.apply(logits, lam, support)


def _promoted(logits: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    if lam.dim() == logits.dim() - 1:
        lam = lam.unsqueeze(-1)
    dtype = at_least_float32(torch.promote_types(logits.dtype, lam.dtype))
    return logits.to(dtype), lam.to(dtype)


def _scaled(logits: Tensor, lam: Tensor) -> Tensor:
    # The projection ignores a shift of the logits. With the largest at 0, those that can be active lie in [-1, 0],
    # whatever the scale of the logits, and nothing is lost to cancellation.
    return (logits - logits.amax(dim=-1, keepdim=True)) / (1 - lam)


class _SparsegenOnSupport(torch.autograd.Function):
    """With g the incoming gradient, S the support and k its size, all per row:

    dL/du_i = (g_i - mean_S g) / (1 - lambda) on S and 0 off it;  dL/dlambda = sum_S (p_i - 1/k) g_i / (1 - lambda).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, lam: Tensor, support: Tensor) -> Tensor:
        z = _scaled(logits, lam)
        k = support.sum(dim=-1, keepdim=True)
        tau = (z.masked_fill(~support, 0).sum(dim=-1, keepdim=True) - 1) / k
        # An active expert never rounds to 0: the weight alone then says who is active, on every rank and in every pass.
        p = (z - tau).clamp_min(torch.finfo(z.dtype).tiny).masked_fill(~support, 0)
        ctx.save_for_backward(p, lam)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        p, lam = ctx.saved_tensors
        support = p != 0
        grad = grad.masked_fill(~support, 0)
        mean = grad.sum(dim=-1, keepdim=True) / support.sum(dim=-1, keepdim=True)
        grad_z = (grad - mean).masked_fill(~support, 0)
        # p sums to 1 over S, so sum_S p_i (g_i - mean_S g) is sum_S (p_i - 1/k) g_i.
        grad_lam = (p * grad_z).sum(dim=-1, keepdim=True) / (1 - lam)
        return grad_z / (1 - lam), grad_lam, None
