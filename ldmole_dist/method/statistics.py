"""What routers did, as sums that add up over micro-batches and ranks, and what is read from them.

`RoutingSums` is an observer (`StepContext.observer`): it is told of every routing of a forward and adds it up on the device.

Shapes: T tokens, E experts; S sums of one linear, S = 4 + (E + 1) + 2 E.
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
    """Sums of what each linear routed since this object was made, padding left out."""

    def __init__(self) -> None:
        self.by_linear: dict[str, Tensor] = {}

    def __call__(self, name: str, routing: Routing, mask_T: Tensor | None) -> None:
        """See `context.Observer`."""
        sums_S = routing_sums(routing, mask_T)
        before = self.by_linear.get(name)
        self.by_linear[name] = sums_S if before is None else before + sums_S


@torch.no_grad()
def routing_sums(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """What is counted of one routing.

    Args:
        routing: of T tokens.
        mask_T: (T,) bool, True for real tokens; None counts every token.

    Returns:
        (S,) float64: tokens, sum of lambda, of its square, of the entropy of p / sum(p) in nats; number of tokens with 0, 1,
        ..., E active experts; for each expert its active tokens, then the sum of its weights.
    """
    p_TE, lam_T = routing.p_TE.detach(), lambda_or_nan(routing).detach().double()
    num_experts = p_TE.shape[1]
    if mask_T is None:
        mask_T = torch.ones(len(p_TE), dtype=torch.bool, device=p_TE.device)
    p_TE = p_TE.masked_fill(~mask_T.unsqueeze(1), 0).double()
    lam_T = lam_T.masked_fill(~mask_T, 0)
    active_TE = p_TE != 0
    # Padding is counted in a bin of its own, behind those of 0 to E experts; a fixed size needs no wait for the device.
    bin_T = torch.where(mask_T, active_TE.sum(1), num_experts + 1)
    histogram = torch.zeros(num_experts + 2, dtype=torch.float64, device=p_TE.device)
    histogram.scatter_add_(0, bin_T, torch.ones_like(lam_T))
    share_TE = p_TE / p_TE.sum(1, keepdim=True).clamp_min(torch.finfo(p_TE.dtype).tiny)  # not every router's sum to 1
    entropy = -torch.xlogy(share_TE, share_TE).sum()
    scalars = torch.stack([mask_T.sum().double(), lam_T.sum(), lam_T.square().sum(), entropy])
    return torch.cat([scalars, histogram[:-1], active_TE.sum(0).double(), p_TE.sum(0)])


def added(sums: Iterable[Tensor]) -> Tensor:
    """The sums of several linears, or of several parts of the data, as those of one; where the numbers of experts differ, those
    that a linear lacks count as never used.

    Args:
        sums: each (S,) from `routing_sums`.
    """
    return torch.cat([pad_sequence(list(part)).sum(1) for part in zip(*map(_parts, sums), strict=True)])


def _parts(sums_S: Tensor) -> tuple[Tensor, ...]:
    """Scalars (4,), histogram (E + 1,), active tokens (E,) and weights (E,)."""
    num_experts = (len(sums_S) - 5) // 3
    return sums_S.split([4, num_experts + 1, num_experts, num_experts])


def summarize(sums_S: Tensor) -> dict[str, Any]:
    """What one linear did, from its sums over any number of micro-batches and ranks.

    Args:
        sums_S: (S,) from `routing_sums`, added up.

    Returns:
        "tokens"; "lambda_mean" and "lambda_std" over tokens, where there is a lambda; "experts_per_token", their mean, and
        "histogram", the share of tokens with 0, 1, ..., E experts; "entropy" of p divided by its sum, mean over tokens, as a
        share of its greatest, ln E; "load", each expert's share of the active (token, expert) pairs, and "weight", its share
        of the weights; "max_load", the largest load times E (1 is balance, E is one expert for all); "dead_experts", the
        number of experts without a token.
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
