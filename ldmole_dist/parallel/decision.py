"""Decide what to send for each (source rank, remote expert): the token rows that the source routes there, or the expert.

Sending an expert (A and B) costs about as much as sending R token rows and returning their sums, so neither is always
cheaper. A row that one expert no longer needs may still be needed by another expert of the same rank, so the choices depend
on each other: the exact optimum is a minimum-weight vertex cover. `choose_fetched_experts` sorts the experts of a rank by
their number of rows, takes the cheapest prefix (from no expert to all of them), and then changes the choice for single experts.
`optimal_fetched_experts` searches exhaustively, for tests.

The cost is the number of elements that the source rank sends and receives for its own tokens in the forward. The cost of the
backward, which exchanges gradients, and of a recomputed forward is about proportional to that of the forward. The exchange of
counts costs the same for every decision, so it is not included.

Shapes: G linears of the input group, T tokens, P ranks, L experts of one linear on each rank, R LoRA rank, X = G L experts of
all linears of the group on one rank.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Number of times that the choice for one expert per rank may be changed after the best prefix is found. With this number, the
# result costs at most 2 % more than the optimum (tests/parallel/test_decision.py, on small random cases).
IMPROVEMENTS = 2
# Several rounds are used only if a rank receives more than twice this number of rows. Fewer rows take no more memory than a
# small micro-batch, so more rounds would save little memory and only add kernel launches.
ROWS_AT_ONCE = 1024


class DispatchDecision(NamedTuple):
    """Experts and rows to send and to receive for one input group. A recomputation carries out the same decision again.

    The lists are on the host, because all-to-all and indexing need sizes without a device synchronization.

    Attributes:
        group: name of the input group.
        fetched_PGL: bool, remote experts that this rank fetches, by the rank that holds them.
        sent_PGL: bool, experts of this rank that each rank fetches.
        send_rows: number of rows to send to each rank. Each row is needed by at least one linear of the group.
        recv_rows: number of rows to receive from each rank.
        send_linear_rows: `[g][q]` is the number of rows to send to rank q that linear g needs.
        recv_linear_rows: `[g][q]` is the number of rows to receive from rank q that linear g needs.
        send_experts: `[g][q]` is the number of experts of linear g to send to rank q.
        recv_experts: `[g][q]` is the number of experts of linear g to receive from rank q.
        here_counts: `[g]` has one entry for each own or fetched expert of linear g, in order of expert index: the number of
            this rank's tokens for which the expert is active.
        recv_counts: `[g][e]` is the number of received rows for which this rank's own expert e of linear g is active.
        rounds: number of rounds in which the rows are exchanged; the same on every rank.
    """

    group: str
    fetched_PGL: Tensor
    sent_PGL: Tensor
    send_rows: list[int]
    recv_rows: list[int]
    send_linear_rows: list[list[int]]
    recv_linear_rows: list[list[int]]
    send_experts: list[list[int]]
    recv_experts: list[list[int]]
    here_counts: list[list[int]]
    recv_counts: list[list[int]]
    rounds: int


@dataclass(frozen=True)
class GroupSizes:
    """Sizes that determine the costs of one input group.

    Args:
        in_features: D.
        out_features: O of each linear.
        lora_ranks: R of each linear.
        experts: L, the number of experts of one linear that each rank holds.
    """

    in_features: int
    out_features: tuple[int, ...]
    lora_ranks: tuple[int, ...]
    experts: int

    @property
    def row(self) -> int:
        """Number of elements of one row sent to one rank: x, and a routing weight for each linear and expert of that rank."""
        return self.in_features + len(self.out_features) * self.experts

    def weights(self) -> list[int]:
        """Return, for each linear, the number of elements of one expert, A and B."""
        return [r * (self.in_features + out) for r, out in zip(self.lora_ranks, self.out_features, strict=True)]


def choose_fetched_experts(support_GTPL: Tensor, own: int, sizes: GroupSizes) -> Tensor:
    """Return the experts that this rank fetches from the other ranks.

    The result never costs more than fetching, from each rank, no expert or all of them.

    Args:
        support_GTPL: (G, T, P, L) bool, this rank's active (token, expert) pairs.
        own: index of this rank in the group; its own experts are never fetched.
        sizes: sizes of the input group.

    Returns:
        (P, G, L) bool, computed on the device of `support_GTPL` without a synchronization.
    """
    G, T, P, L = support_GTPL.shape
    support_GTPL = support_GTPL.clone()
    support_GTPL[:, :, own] = False
    device = support_GTPL.device
    # torch.full instead of torch.tensor: copying from the host to the device would synchronize.
    weight_X = torch.cat([torch.full((L,), weight, device=device) for weight in sizes.weights()])
    support_TPX = support_GTPL.permute(1, 2, 0, 3).flatten(2)
    fetched_PX = _best_prefix(support_TPX, weight_X, sizes)
    for _ in range(IMPROVEMENTS):
        gain_PX = _gains(support_TPX, fetched_PX, weight_X, sizes)
        best_P1 = gain_PX.argmax(dim=1, keepdim=True)
        change_PX = torch.zeros_like(fetched_PX).scatter_(1, best_P1, gain_PX.gather(1, best_P1) > 0)
        fetched_PX = fetched_PX ^ change_PX
    return fetched_PX.view(P, G, L)


def _best_prefix(support_TPX: Tensor, weight_X: Tensor, sizes: GroupSizes) -> Tensor:
    """Return (P, X) bool: for each rank, the cheapest prefix of its experts, sorted by descending number of rows."""
    T, P, X = support_TPX.shape
    L, G = sizes.experts, len(sizes.out_features)
    order_PX = support_TPX.sum(0).argsort(dim=1, descending=True, stable=True)
    place_PX = torch.empty_like(order_PX).scatter_(
        1, order_PX, torch.arange(1, X + 1, device=order_PX.device).expand(P, X)
    )
    # A row is sent unless the prefix contains all of its experts, that is, the last of them in the order.
    places_TPX = support_TPX * place_PX
    weights_PX = torch.nn.functional.pad(weight_X[order_PX].cumsum(1), (1, 0))
    cost = weights_PX + sizes.row * _rows_sent(places_TPX.amax(-1), X)
    for g, out in enumerate(sizes.out_features):
        cost = cost + out * _rows_sent(places_TPX[..., g * L : (g + 1) * L].amax(-1), X)
    assert G * L == X
    return place_PX <= cost.argmin(dim=1, keepdim=True)


def _rows_sent(last_TP: Tensor, X: int) -> Tensor:
    """Return (P, X + 1): the number of rows sent for a prefix of 0, 1, ..., X experts.

    Args:
        last_TP: position, from 1 to X, of the last of a row's experts in the order; 0 if the row has no expert on the rank.
        X: number of experts of one rank.
    """
    histogram = torch.zeros(last_TP.shape[1], X + 1, dtype=torch.long, device=last_TP.device)
    histogram.scatter_add_(1, last_TP.t(), torch.ones_like(last_TP.t()))
    return histogram.sum(1, keepdim=True) - histogram.cumsum(1)


def _gains(support_TPX: Tensor, fetched_PX: Tensor, weight_X: Tensor, sizes: GroupSizes) -> Tensor:
    """Return (P, X): elements saved by changing the choice for one expert, to fetch it or to no longer fetch it."""
    L = sizes.experts
    unfetched_TPX = support_TPX & ~fetched_PX
    # Rows sent for this expert alone: no other expert of the row is left unfetched.
    alone_TPX = support_TPX & _depends(unfetched_TPX.sum(-1, keepdim=True), fetched_PX)
    saved_PX = sizes.row * alone_TPX.sum(0)
    for g, out in enumerate(sizes.out_features):
        part = slice(g * L, (g + 1) * L)
        left = unfetched_TPX[..., part].sum(-1, keepdim=True)
        saved_PX[:, part] += out * (support_TPX[..., part] & _depends(left, fetched_PX[:, part])).sum(0)
    gain_PX = saved_PX - weight_X
    return torch.where(fetched_PX, -gain_PX, gain_PX)


def _depends(left_TP1: Tensor, fetched_PX: Tensor) -> Tensor:
    """Return (T, P, X) bool: whether all other experts that the row needs on the rank are fetched.

    The result is valid only for rows that need the expert.

    Args:
        left_TP1: number of unfetched experts of each row.
        fetched_PX: bool, the fetched experts; they are not counted in `left_TP1`.
    """
    return torch.where(fetched_PX, left_TP1 == 0, left_TP1 == 1)


def number_of_rounds(rows_PP: list[list[int]]) -> int:
    """Return the number of rounds in which to exchange the rows of a dispatch.

    Rounds limit the received rows that a rank holds at once to about twice the mean over ranks, or to twice `ROWS_AT_ONCE` if
    that is larger.

    Args:
        rows_PP: `rows_PP[p][q]` is the number of rows that rank p sends to rank q.

    Returns:
        1 if no rank receives more than twice the mean over ranks (or `ROWS_AT_ONCE`, if that is larger); otherwise the largest
        number that a rank receives, divided by that mean (or `ROWS_AT_ONCE`) and rounded up.
    """
    received = [sum(to_rank) for to_rank in zip(*rows_PP, strict=True)]
    share = max(math.ceil(sum(received) / len(received)), ROWS_AT_ONCE)
    return math.ceil(max(received) / share) if max(received) > 2 * share else 1


def count_message_elements(ranks: int, sizes: GroupSizes) -> int:
    """Return the number of counts that one rank sends before a dispatch, once per micro-batch and input group.

    Each other rank receives the number of rows for each linear, the number of tokens for each of its experts in each linear (or
    -1, which requests the expert), and the numbers of rows that the sender sends to each of the P ranks.

    Args:
        ranks: P.
        sizes: sizes of the input group.
    """
    linears = len(sizes.out_features)
    return (ranks - 1) * (linears + linears * sizes.experts + ranks)


def payload_elements(
    support_GTPL: Tensor, fetched_PGL: Tensor, own: int, sizes: GroupSizes, rounds: int = 1
) -> dict[str, int]:
    """Return the number of elements, by kind, that one rank sends and receives for its own tokens in one forward.

    The backward sends the same number of gradients in the opposite direction, except for kinds that need no gradient. With
    several rounds, the backward also sends the rows and gates again.

    Args:
        support_GTPL: (G, T, P, L) bool, the rank's active pairs.
        fetched_PGL: (P, G, L) bool, the experts that the rank fetches.
        own: index of the rank in the group.
        sizes: sizes of the input group.
        rounds: number of rounds in which the rows are exchanged.

    Returns:
        "rows" and "gates" that the rank sends, "sums" and "weights" that it receives.
    """
    remote = support_GTPL & ~fetched_PGL.transpose(0, 1).unsqueeze(1)
    remote[:, :, own] = False
    need_GTP = remote.any(-1)
    rows = int(need_GTP.any(0).sum())
    # With several rounds, every row returns a sum for every linear, because the rows that a linear needs are not counted per
    # round.
    per_linear = need_GTP.sum((1, 2)).tolist() if rounds == 1 else [rows] * len(need_GTP)
    fetched = fetched_PGL.sum((0, 2)).tolist()
    return {
        "rows": rows * sizes.in_features,
        "gates": rows * len(sizes.out_features) * sizes.experts,
        "sums": sum(n * out for n, out in zip(per_linear, sizes.out_features, strict=True)),
        "weights": sum(n * weight for n, weight in zip(fetched, sizes.weights(), strict=True)),
    }


def optimal_fetched_experts(support_GTPL: Tensor, own: int, sizes: GroupSizes) -> Tensor:
    """Return the optimal choice of fetched experts, by exhaustive search over 2^(G L) sets for each rank; for tests.

    See `choose_fetched_experts` for the arguments and the result.
    """
    G, T, P, L = support_GTPL.shape
    best = torch.zeros(P, G, L, dtype=torch.bool)
    for rank in range(P):
        if rank == own:
            continue
        lowest = None
        for bits in itertools.product((False, True), repeat=G * L):
            fetched = torch.zeros(P, G, L, dtype=torch.bool)
            fetched[rank] = torch.tensor(bits).view(G, L)
            only = torch.zeros_like(support_GTPL)
            only[:, :, rank] = support_GTPL[:, :, rank]
            cost = sum(payload_elements(only, fetched, own, sizes).values())
            if lowest is None or cost < lowest:
                lowest, best[rank] = cost, fetched[rank]
    return best
