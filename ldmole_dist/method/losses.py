"""The auxiliary losses of adapted linears, as functions of their routing and the token mask.

Each averages over the real tokens of the call. A call without real tokens returns 0 attached to the graph, so that every rank
runs the same backward. The caller averages over linears, micro-batches and ranks. Leading dimensions, usually the linears of an
input group, are kept: one call for all of them launches no more kernels than a call for one.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balance_loss(p: Tensor, mask: Tensor | None = None, prob: Tensor | None = None) -> Tensor:
    """Return L_lb = E * sum_e freq_e * prop_e.

    For weights that sum to 1, and without `prob`, it is 1 if all experts are used equally and E if only one expert is used.
    freq_e is the share of expert e in the active (token, expert) pairs and carries no gradient. prop_e is its mean weight, or
    its mean probability before the selection if `prob` is given, which gives inactive experts a gradient too.

    Source: the paper's load-balancing loss; with `prob`, that of the Switch Transformer, arXiv 2101.03961, as used by MoLA.
    For top-p, Huang et al. (see `entropy_loss`) define freq_e as a share of the tokens instead of the pairs.

    Args:
        p: (..., T, E) routing weights.
        mask: (T,) bool, True for real tokens; None counts every token.
        prob: (..., T, E) probabilities before the selection, for top-k and top-p.

    Returns:
        (...), one loss for each leading index.
    """
    mask_T1 = _mask(p, mask)
    active_E = ((p.detach() != 0) & mask_T1).sum(dim=-2).to(p.dtype)
    freq_E = active_E / active_E.sum(dim=-1, keepdim=True).clamp_min(1)
    prop_E = _masked(p if prob is None else prob, mask_T1).sum(dim=-2) / mask_T1.sum().clamp_min(1)
    return p.shape[-1] * (freq_E * prop_E).sum(dim=-1)


def sparsity_loss(logits: Tensor, lam: Tensor, target_k: int, mask: Tensor | None = None) -> Tensor:
    """Return L_sparse, the mean of relu(lambda_low(k*) - lambda), which raises lambda until at most k* experts are active.

    lambda_low(k) = 1 - sum_{i<=k} (u_(i) - u_(k+1)), with u sorted in descending order and detached (Proposition 2).

    Args:
        logits: (..., T, E) router scores u.
        lam: (T,) or (..., T), sparsity lambda.
        target_k: k*, the target number of active experts per token. If k* >= E, the loss is 0.
        mask: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (...), one loss for each leading index.
    """
    mask_T1 = _mask(logits, mask)
    if target_k >= logits.shape[-1]:
        return lam.sum() * logits.new_zeros(logits.shape[:-2])
    top = logits.detach().topk(target_k + 1, dim=-1).values
    lam_low = 1 - (top[..., :-1] - top[..., -1:]).sum(dim=-1)
    excess_T = F.relu(lam_low - lam)
    return _masked(excess_T, mask_T1.squeeze(-1)).sum(dim=-1) / mask_T1.sum().clamp_min(1)


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of logsumexp(u)^2, which keeps router scores from growing without bound.

    Source: ST-MoE, arXiv 2202.08906, equation 5. Not in the LD-MoLE paper.

    Args:
        logits: (..., T, E) router scores u.
        mask: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (...), one loss for each leading index.
    """
    mask_T1 = _mask(logits, mask)
    z_T = torch.logsumexp(logits, dim=-1).square()
    return _masked(z_T, mask_T1.squeeze(-1)).sum(dim=-1) / mask_T1.sum().clamp_min(1)


def l1_loss(p: Tensor, target_k: int, mask: Tensor | None = None) -> Tensor:
    """Return sum_e f_e * (mean weight of e), where f_e = E / (target_k T) * (tokens with e active) carries no gradient.

    An L1 norm of the weights with a larger factor for experts with many tokens, which makes routing sparse and balanced at
    once. Its coefficient adapts (`next_l1_coefficient`). Source: ReMoE, arXiv 2412.14711, the L1 regularization refined for
    load balancing.

    Args:
        p: (..., T, E) routing weights.
        target_k: k, the target number of active experts per token.
        mask: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (...), one loss for each leading index.
    """
    mask_T1 = _mask(p, mask)
    tokens = mask_T1.sum().clamp_min(1)
    active_E = ((p.detach() != 0) & mask_T1).sum(dim=-2).to(p.dtype)
    f_E = p.shape[-1] * active_E / (target_k * tokens)
    return (f_E * _masked(p, mask_T1).sum(dim=-2) / tokens).sum(dim=-1)


def next_l1_coefficient(coefficient: float, experts_per_token: float, target_k: int, rate: float) -> float:
    """Return the coefficient of the L1 loss for the next optimizer step.

    The coefficient is multiplied by `rate` if more experts than the target were active, and divided by `rate` if fewer were.

    Args:
        coefficient: coefficient of this step.
        experts_per_token: mean number of active experts over linears and real tokens of all ranks.
        target_k: the target number of active experts per token.
        rate: factor above 1; alpha in ReMoE, which uses 1.2.
    """
    if experts_per_token == target_k:
        return coefficient
    return coefficient * rate if experts_per_token > target_k else coefficient / rate


def entropy_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean entropy of softmax(u) in nats; a low entropy lets top-p reach its threshold with few experts.

    Source: Huang et al. 2024, arXiv 2403.07652, the dynamic loss.

    Args:
        logits: (..., T, E) router scores u.
        mask: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (...), one loss for each leading index.
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
    # masked_fill instead of a product with the mask: 0 * NaN would let the NaN of a padding row reach the sum.
    return values.masked_fill(~mask, 0)
