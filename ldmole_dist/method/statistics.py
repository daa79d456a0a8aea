"""Routing statistics: sums that can be added over micro-batches and ranks, and statistics computed from them.

`RoutingSums` is an observer (`StepContext.observer`) that accumulates the routing of forwards on the device.

Shapes: T tokens, E experts, S = 4 + (E + 1) + 2 E sums of one linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ldmole_dist.method.routers import Routing, lambda_or_nan


class RoutingSums:
    """Observer that accumulates the `routing_sums` of each linear over its real tokens.

    Attributes:
        by_linear: (S,) sums of each linear, by its name.
    """

    def __init__(self) -> None:
        self.by_linear: dict[str, Tensor] = {}

    def __call__(self, name: str, routing: Routing, mask_T: Tensor | None) -> None:
        """Add the routing of the linear `name` to its sums (signature of `context.Observer`)."""
        sums_S = routing_sums(routing, mask_T)
        before = self.by_linear.get(name)
        self.by_linear[name] = sums_S if before is None else before + sums_S


@torch.no_grad()
def routing_sums(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Return the sums of one routing from which `summarize` derives all statistics.

    Args:
        routing: routing of one linear, (T, E).
        mask_T: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (S,) float64: number of real tokens; sums of lambda and of its square, NaN for routers without lambda; sum of the
        entropy of p / sum(p) in nats; number of tokens with 0, 1, ..., E active experts; number of active tokens of each
        expert; sum of the weights of each expert.
    """
    p_TE, lam_T = routing.p_TE.detach(), lambda_or_nan(routing).detach().double()
    num_experts = p_TE.shape[1]
    if mask_T is None:
        mask_T = torch.ones(len(p_TE), dtype=torch.bool, device=p_TE.device)
    p_TE = p_TE.masked_fill(~mask_T.unsqueeze(1), 0).double()
    lam_T = lam_T.masked_fill(~mask_T, 0)
    active_TE = p_TE != 0
    # Padding tokens get a bin of their own, after those for 0 to E active experts. torch.bincount and boolean indexing would
    # synchronize the device.
    bin_T = torch.where(mask_T, active_TE.sum(1), num_experts + 1)
    histogram = torch.zeros(num_experts + 2, dtype=torch.float64, device=p_TE.device)
    histogram.scatter_add_(0, bin_T, torch.ones_like(lam_T))
    # Normalize: the weights of top-p and ReLU routers do not sum to 1.
    share_TE = p_TE / p_TE.sum(1, keepdim=True).clamp_min(torch.finfo(p_TE.dtype).tiny)
    entropy = -torch.xlogy(share_TE, share_TE).sum()
    scalars = torch.stack([mask_T.sum().double(), lam_T.sum(), lam_T.square().sum(), entropy])
    return torch.cat([scalars, histogram[:-1], active_TE.sum(0).double(), p_TE.sum(0)])


def merge_sums(sums: Iterable[Tensor]) -> Tensor:
    """Add the sums of several linears or of several parts of the data.

    Linears may have different numbers of experts; missing experts count as unused.

    Args:
        sums: results of `routing_sums`, each (S,).

    Returns:
        (S,), where S is that of the largest number of experts.
    """
    return torch.cat([pad_sequence(list(part)).sum(1) for part in zip(*map(_parts, sums), strict=True)])


def _parts(sums_S: Tensor) -> tuple[Tensor, ...]:
    """Split sums into scalars (4,), histogram (E + 1,), active tokens (E,) and weights (E,)."""
    num_experts = (len(sums_S) - 5) // 3
    return sums_S.split([4, num_experts + 1, num_experts, num_experts])


def summarize(sums_S: Tensor) -> dict[str, Any]:
    """Return the routing statistics of one linear, or of several linears together, from their sums.

    Args:
        sums_S: (S,) from `routing_sums`, added over micro-batches and ranks, or from `merge_sums`. If it covers several
            linears, a token counts once for each linear, and the experts with the same index count as one expert.

    Returns:
        "tokens": number of real tokens.
        "lambda_mean", "lambda_std": mean and standard deviation over tokens; left out for routers without lambda.
        "experts_per_token": mean number of active experts per token.
        "histogram": fraction of tokens with 0, 1, ..., E active experts.
        "entropy": entropy of p / sum(p), averaged over tokens and divided by its maximum ln E; 0 if E = 1.
        "load": each expert's share of the active (token, expert) pairs.
        "weight": each expert's share of the summed weights.
        "max_load": the largest load times E; 1 if all experts are used equally, E if only one expert is used.
        "dead_experts": number of experts that no token activated.
    """
    scalars, histogram, active, weights = _parts(sums_S.double().cpu())
    num_experts = len(active)
    tokens, lam, lam_square, entropy = scalars.tolist()
    count = max(tokens, 1.0)
    load = active / active.sum().clamp_min(1)
    mean = lam / count
    spread = {"lambda_mean": mean, "lambda_std": math.sqrt(max(lam_square / count - mean * mean, 0.0))}
    return (
        {"tokens": int(tokens)}
        | ({} if math.isnan(lam) else spread)
        | {
            "experts_per_token": float(active.sum()) / count,
            "histogram": (histogram / count).tolist(),
            "entropy": entropy / count / math.log(num_experts) if num_experts > 1 else 0.0,
            "load": load.tolist(),
            "weight": (weights / weights.sum().clamp_min(1e-300)).tolist(),
            "max_load": float(load.max()) * num_experts,
            "dead_experts": int((active == 0).sum()),
        }
    )
