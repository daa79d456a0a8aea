"""The auxiliary losses of adapted linears: pure functions of their routing and the token mask.

Each is a mean over the real tokens of this call; a call without a real token gives 0, attached to the graph (every rank
must run the same backward). Averaging over linears, micro-batches and ranks is the caller's. Leading dimensions, usually the
linears of an input group, are kept: one call for all of them starts no more kernels than a call for one.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balance_loss(p: Tensor, mask: Tensor | None = None, prob: Tensor | None = None) -> Tensor:
    """E * sum_e freq_e * prop_e: 1 when all experts are used alike, E when one does everything.

    freq_e is expert e's share of the active (token, expert) pairs and carries no gradient; prop_e its mean weight, or the mean
    probability that it had before the choice, which tells the experts that were not chosen too.

    Args:
        p: (..., T, E) routing weights.
        mask: (T,) bool, True for real tokens; None counts every token.
        prob: (..., T, E) probabilities before the choice, for top-k and top-p; None where p is all there is.

    Returns:
        (...). Source: the paper's load-balancing loss (METHOD, L_lb); with `prob` that of the Switch Transformer, arXiv
        2101.03961, as MoLA and Huang et al. have it.
    """
    mask_T1 = _mask(p, mask)
    active_E = ((p.detach() != 0) & mask_T1).sum(dim=-2).to(p.dtype)
    freq_E = active_E / active_E.sum(dim=-1, keepdim=True).clamp_min(1)
    prop_E = _masked(p if prob is None else prob, mask_T1).sum(dim=-2) / mask_T1.sum().clamp_min(1)
    return p.shape[-1] * (freq_E * prop_E).sum(dim=-1)


def sparsity_loss(logits: Tensor, lam: Tensor, target_k: int, mask: Tensor | None = None) -> Tensor:
    """Mean of relu(lambda_low(k) - lambda): pushes lambda up to where at most `target_k` experts are active.

    lambda_low(k) = 1 - sum_{i<=k} (u_(i) - u_(k+1)) with u sorted descending and detached (Proposition 2).

    Args:
        logits: (..., T, E) router scores u.
        lam: (T,), or (..., T).
        target_k: k*; with k* >= E nothing can be pushed and the loss is 0.
        mask: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (...).
    """
    mask_T1 = _mask(logits, mask)
    if target_k >= logits.shape[-1]:
        return lam.sum() * logits.new_zeros(logits.shape[:-2])
    top = logits.detach().topk(target_k + 1, dim=-1).values
    lam_low = 1 - (top[..., :-1] - top[..., -1:]).sum(dim=-1)
    excess_T = F.relu(lam_low - lam)
    return _masked(excess_T, mask_T1.squeeze(-1)).sum(dim=-1) / mask_T1.sum().clamp_min(1)


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(u)^2: keeps router scores from growing without bound (ST-MoE, arXiv 2202.08906, equation 5).

    Args:
        logits: (..., T, E) router scores u.
        mask: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (...).
    """
    mask_T1 = _mask(logits, mask)
    z_T = torch.logsumexp(logits, dim=-1).square()
    return _masked(z_T, mask_T1.squeeze(-1)).sum(dim=-1) / mask_T1.sum().clamp_min(1)


def l1_loss(p: Tensor, target_k: int, mask: Tensor | None = None) -> Tensor:
    """sum_e f_e * mean weight of e, with f_e = E / (target_k tokens) * (tokens that have e active), without gradient.

    An L1 norm of the weights that presses harder on experts with many tokens: it makes routing sparse and balanced at once. Its
    coefficient adapts (`adapted_l1`).

    Args:
        p: (..., T, E) routing weights.
        target_k: k, the number of active experts per token that is steered to.
        mask: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (...). Source: ReMoE, arXiv 2412.14711, the regularisation refined for load balancing.
    """
    mask_T1 = _mask(p, mask)
    tokens = mask_T1.sum().clamp_min(1)
    active_E = ((p.detach() != 0) & mask_T1).sum(dim=-2).to(p.dtype)
    f_E = p.shape[-1] * active_E / (target_k * tokens)
    return (f_E * _masked(p, mask_T1).sum(dim=-2) / tokens).sum(dim=-1)


def adapted_l1(coefficient: float, experts_per_token: float, target_k: int, rate: float) -> float:
    """The coefficient of the L1 loss for the next optimizer step: times `rate` where more experts were active than wanted,
    divided by it where fewer were.

    Args:
        coefficient: of this step.
        experts_per_token: active ones, mean over linears and real tokens of all ranks.
        target_k: that is steered to.
        rate: above 1; ReMoE's alpha, 1.2 there.
    """
    if experts_per_token == target_k:
        return coefficient
    return coefficient * rate if experts_per_token > target_k else coefficient / rate


def entropy_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of softmax(u), in nats: small where few experts have most of the mass, so that top-p needs few.

    Args:
        logits: (..., T, E) router scores u.
        mask: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (...). Source: Huang et al. 2024, arXiv 2403.07652, the dynamic loss.
    """
    mask_T1 = _mask(logits, mask)
    log_p_TE = logits.log_softmax(-1)
    entropy_T = -(log_p_TE.exp() * log_p_TE).sum(-1)
    return _masked(entropy_T, mask_T1.squeeze(-1)).sum(dim=-1) / mask_T1.sum().clamp_min(1)


def _mask(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(values.shape[-2], 1, dtype=torch.bool, device=values.device)
    return mask.bool().unsqueeze(-1)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    # Filled, not multiplied: what a padding row holds, NaN included, must not reach the sum.
    return values.masked_fill(~mask, 0)
