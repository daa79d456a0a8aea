"""What moves between a token's rank and an expert's rank: the rows, or the expert. An LD-MoLE expert weighs r tokens.

For every (source rank, expert that lives elsewhere) either the rows travel that the source routes to it, or the expert's
A and B do. A row saved for one expert may still travel for another of the same rank, so the choices hang together: the
exact optimum is a minimum-weight vertex cover. `cheapest_ships` takes the best prefix of the experts in order of their
rows (which includes all and none) and improves it one expert at a time; `optimal_ships` tries everything, for tests.

Costs are elements, of one direction: what goes out in the forward comes back as gradients in the backward, and a
recomputation repeats the forward, so that all of it scales alike. Counts are not in them (they always travel).

Shapes: G linears of the input group, T tokens, P ranks, L experts of each rank, X = G L experts of one rank.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Single changes tried after the best prefix; one reached the optimum in every cell of the test's sweep.
IMPROVEMENTS = 2
# So many rows are no burden for any rank: they weigh as much as a small micro-batch.
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class GroupSizes:
    """Widths of one input group.

    Args:
        in_features: D.
        out_features: O of each linear.
        rank: R.
        experts: L, experts of each rank.
    """

    in_features: int
    out_features: tuple[int, ...]
    rank: int
    experts: int

    @property
    def row(self) -> int:
        """Elements of one (token, rank) row: x and a weight for each of the rank's experts."""
        return self.in_features + len(self.out_features) * self.experts

    def weights(self) -> list[int]:
        """Elements of one expert of each linear: A and B."""
        return [self.rank * (self.in_features + out) for out in self.out_features]


def cheapest_ships(support_GTPL: Tensor, own: int, sizes: GroupSizes) -> Tensor:
    """Which experts travel to this rank, never costlier than all or none of each other rank's.

    Args:
        support_GTPL: (G, T, P, L) bool, this rank's active (token, expert) pairs.
        own: this rank; its own experts do not travel.
        sizes: of the group.

    Returns:
        (P, G, L) bool. Computed on the device of `support_GTPL` without waiting for it.
    """
    G, T, P, L = support_GTPL.shape
    support_GTPL = support_GTPL.clone()
    support_GTPL[:, :, own] = False
    device = support_GTPL.device
    # Filled, not copied: a copy to the device would wait for it.
    weight_X = torch.cat([torch.full((L,), weight, device=device) for weight in sizes.weights()])
    support_TPX = support_GTPL.permute(1, 2, 0, 3).flatten(2)
    shipped_PX = _best_prefix(support_TPX, weight_X, sizes)
    for _ in range(IMPROVEMENTS):
        gain_PX = _gains(support_TPX, shipped_PX, weight_X, sizes)
        best_P1 = gain_PX.argmax(dim=1, keepdim=True)
        change_PX = torch.zeros_like(shipped_PX).scatter_(1, best_P1, gain_PX.gather(1, best_P1) > 0)
        shipped_PX = shipped_PX ^ change_PX
    return shipped_PX.view(P, G, L)


def _best_prefix(support_TPX: Tensor, weight_X: Tensor, sizes: GroupSizes) -> Tensor:
    """The cheapest of: no expert, the one with most rows, the two with most rows, ... for every rank. (P, X) bool."""
    T, P, X = support_TPX.shape
    L, G = sizes.experts, len(sizes.out_features)
    order_PX = support_TPX.sum(0).argsort(dim=1, descending=True, stable=True)
    place_PX = torch.empty_like(order_PX).scatter_(
        1, order_PX, torch.arange(1, X + 1, device=order_PX.device).expand(P, X)
    )
    # A row travels until the last of its experts is shipped.
    places_TPX = support_TPX * place_PX
    weights_PX = torch.nn.functional.pad(weight_X[order_PX].cumsum(1), (1, 0))
    cost = weights_PX + sizes.row * _still_travelling(places_TPX.amax(-1), X)
    for g, out in enumerate(sizes.out_features):
        cost = cost + out * _still_travelling(places_TPX[..., g * L : (g + 1) * L].amax(-1), X)
    assert G * L == X
    return place_PX <= cost.argmin(dim=1, keepdim=True)


def _still_travelling(last_TP: Tensor, X: int) -> Tensor:
    """(P, X + 1): rows whose last place is beyond 0, 1, ..., X shipped experts."""
    histogram = torch.zeros(last_TP.shape[1], X + 1, dtype=torch.long, device=last_TP.device)
    histogram.scatter_add_(1, last_TP.t(), torch.ones_like(last_TP.t()))
    return histogram.sum(1, keepdim=True) - histogram.cumsum(1)


def _gains(support_TPX: Tensor, shipped_PX: Tensor, weight_X: Tensor, sizes: GroupSizes) -> Tensor:
    """(P, X): elements saved by shipping one more expert, or by not shipping one that is."""
    L = sizes.experts
    unshipped_TPX = support_TPX & ~shipped_PX
    # Rows that hang on this expert alone: the only unshipped one left, or what would be the only one.
    alone_TPX = support_TPX & _depends(unshipped_TPX.sum(-1, keepdim=True), shipped_PX)
    saved_PX = sizes.row * alone_TPX.sum(0)
    for g, out in enumerate(sizes.out_features):
        part = slice(g * L, (g + 1) * L)
        left = unshipped_TPX[..., part].sum(-1, keepdim=True)
        saved_PX[:, part] += out * (support_TPX[..., part] & _depends(left, shipped_PX[:, part])).sum(0)
    gain_PX = saved_PX - weight_X
    return torch.where(shipped_PX, -gain_PX, gain_PX)


def _depends(left_TP1: Tensor, shipped_PX: Tensor) -> Tensor:
    return torch.where(shipped_PX, left_TP1 == 0, left_TP1 == 1)


def number_of_rounds(rows_PP: list[list[int]]) -> int:
    """How many rounds the rows of a dispatch travel in, so that no rank receives far more at a time than an even spread of
    all rows would bring it: its memory stays below twice that of the balanced case, however skewed the routing.

    Args:
        rows_PP: rows that each rank sends to each.

    Returns:
        1, unless the busiest rank receives more than twice the even share (or than `ROWS_AT_ONCE`, if that is more).
    """
    received = [sum(to_rank) for to_rank in zip(*rows_PP, strict=True)]
    share = max(math.ceil(sum(received) / len(received)), ROWS_AT_ONCE)
    return math.ceil(max(received) / share) if max(received) > 2 * share else 1


def count_elements(ranks: int, sizes: GroupSizes) -> int:
    """Numbers that one rank tells the others before anything moves, once for each micro-batch and input group.

    To each: rows for each linear, tokens of each of its experts (or "send it here"), and its rows for every rank.
    """
    linears = len(sizes.out_features)
    return (ranks - 1) * (linears + linears * sizes.experts + ranks)


def elements(support_GTPL: Tensor, shipped_PGL: Tensor, own: int, sizes: GroupSizes, rounds: int = 1) -> dict[str, int]:
    """Elements by kind that one rank's tokens put on the wire in one forward, in both directions.

    Args:
        support_GTPL: (G, T, P, L) bool, the rank's active pairs.
        shipped_PGL: (P, G, L) bool, the experts that travel to it.
        own: the rank.
        sizes: of the group.
        rounds: that the rows travel in.

    Returns:
        "rows" and "gates" that it sends, "sums" and "weights" that come to it. The backward moves as many the other way as
        gradients (none of rows where the input needs none), and in rounds sends rows and gates again.
    """
    travelling = support_GTPL & ~shipped_PGL.transpose(0, 1).unsqueeze(1)
    travelling[:, :, own] = False
    need_GTP = travelling.any(-1)
    rows = int(need_GTP.any(0).sum())
    # In rounds every row comes back for every linear.
    per_linear = need_GTP.sum((1, 2)).tolist() if rounds == 1 else [rows] * len(need_GTP)
    ships = shipped_PGL.sum((0, 2)).tolist()
    return {
        "rows": rows * sizes.in_features,
        "gates": rows * len(sizes.out_features) * sizes.experts,
        "sums": sum(n * out for n, out in zip(per_linear, sizes.out_features, strict=True)),
        "weights": sum(n * weight for n, weight in zip(ships, sizes.weights(), strict=True)),
    }


def optimal_ships(support_GTPL: Tensor, own: int, sizes: GroupSizes) -> Tensor:
    """As `cheapest_ships`, by trying every set of every rank: 2^(G L) of them."""
    G, T, P, L = support_GTPL.shape
    best = torch.zeros(P, G, L, dtype=torch.bool)
    for rank in range(P):
        if rank == own:
            continue
        lowest = None
        for bits in itertools.product((False, True), repeat=G * L):
            shipped = torch.zeros(P, G, L, dtype=torch.bool)
            shipped[rank] = torch.tensor(bits).view(G, L)
            only = torch.zeros_like(support_GTPL)
            only[:, :, rank] = support_GTPL[:, :, rank]
            cost = sum(elements(only, shipped, own, sizes).values())
            if lowest is None or cost < lowest:
                lowest, best[rank] = cost, shipped[rank]
    return best
