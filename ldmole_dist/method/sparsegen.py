"""Sparsegen: a projection onto the simplex whose sparsity is set by lambda, which LD-MoLE predicts for each token.

    p = argmin over the simplex of ||p - u||^2 - lambda ||p||^2,   lambda < 1

Division by 1 - lambda > 0 turns it into the Euclidean projection of u / (1 - lambda) onto the simplex (sparsemax), which has
a closed form. Sources: LD-MoLE, arXiv 2509.25684, section 3; Laha et al. 2018, "On Controllable Sparse Alternatives to
Softmax". docs/method.md has the closed form.

Shapes: E experts; leading dimensions (usually T tokens) are arbitrary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that routing is computed in: float32 for half precision and float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def sparsegen(logits: Tensor, lam: Tensor) -> Tensor:
    """Return routing weights on the simplex, exactly 0 for inactive experts. Differentiable in both arguments.

    At least one expert is active (Lemma 1 of the paper).

    Args:
        logits: (..., E) router scores u, of any scale; half precision is promoted to float32.
        lam: (..., 1) or (...), sparsity lambda < 1. lambda -> 1 activates one expert, 0 is sparsemax, and lambda -> -inf
            weights all experts equally. Values of 1 or more are not rejected: the check would synchronize the device, and
            `LambdaMLP` cannot produce them.

    Returns:
        (..., E) non-negative weights that sum to 1 over the last dimension. A NaN in a row makes the whole row NaN.
    """
    logits, lam = _promoted(logits, lam)
    return sparsegen_on_support(logits, lam, sparsegen_support(logits, lam))


@torch.no_grad()
def sparsegen_support(logits: Tensor, lam: Tensor) -> Tensor:
    """Return which experts Sparsegen activates, without their weights.

    Args:
        logits: (..., E) router scores u.
        lam: (..., 1) or (...), sparsity lambda < 1.

    Returns:
        (..., E) bool, with at least one True in each row. A row with a NaN is all True, so that the NaN reaches the output.
    """
    logits, lam = _promoted(logits, lam)
    z = _scaled(logits, lam)
    z_sorted = z.sort(dim=-1, descending=True).values
    prefix = z_sorted.cumsum(dim=-1)
    position = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    k = (1 + position * z_sorted > prefix).sum(dim=-1, keepdim=True).clamp_min(1)
    # Compare with the k-th largest score, not with tau: tau is rounded, so it could select more or fewer than k experts.
    return ~(z < z_sorted.gather(-1, k - 1))


def sparsegen_on_support(logits: Tensor, lam: Tensor, support: Tensor) -> Tensor:
    """Return Sparsegen's weights for a given set of active experts, such as the one that a recomputed forward replays.

    Args:
        logits: (..., E) router scores u.
        lam: (..., 1) or (...), sparsity lambda < 1.
        support: (..., E) bool, the active experts.

    Returns:
        (..., E) weights, positive exactly on the support, so that `p != 0` recovers it.
    """
    logits, lam = _promoted(logits, lam)
    return _SparsegenOnSupport.apply(logits, lam, support)


def _promoted(logits: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    if lam.dim() == logits.dim() - 1:
        lam = lam.unsqueeze(-1)
    dtype = at_least_float32(torch.promote_types(logits.dtype, lam.dtype))
    return logits.to(dtype), lam.to(dtype)


def _scaled(logits: Tensor, lam: Tensor) -> Tensor:
    # The projection is invariant to a shift of the logits. With the largest at 0, the scaled scores of active experts are in
    # (-1, 0] for logits of any scale, which avoids cancellation in the prefix sums.
    return (logits - logits.amax(dim=-1, keepdim=True)) / (1 - lam)


class _SparsegenOnSupport(torch.autograd.Function):
    """Sparsegen weights on a given support, with a closed-form backward.

    With g the incoming gradient, S the support and k its size, for each row:

    dL/du_i = (g_i - mean_S g) / (1 - lambda) on S and 0 off it;  dL/dlambda = sum_S (p_i - 1/k) g_i / (1 - lambda).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, lam: Tensor, support: Tensor) -> Tensor:
        z = _scaled(logits, lam)
        k = support.sum(dim=-1, keepdim=True)
        tau = (z.masked_fill(~support, 0).sum(dim=-1, keepdim=True) - 1) / k
        # An active weight must not round to 0: the dispatch, the statistics and the backward read the support from p != 0.
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
        # p sums to 1 over S, so sum_S p_i (g_i - mean_S g) = sum_S (p_i - 1/k) g_i.
        grad_lam = (p * grad_z).sum(dim=-1, keepdim=True) / (1 - lam)
        return grad_z / (1 - lam), grad_lam, None
