"""Expert-parallel dispatch: tokens travel to the ranks that hold their active experts, one partial sum each comes back.

A token's row goes at most once to each remote rank, however many of its experts live there and however many linears of
the input group need it; the rows of a rank's own experts do not travel. No token is dropped, nothing is padded.

Shapes: T tokens on this rank, D in-features, O out-features, E experts in all, L experts held here, P ranks of the
expert-parallel group, N rows sent, M rows received, G linears in the input group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.method.experts import ExpertBank, apply_experts
from ldmole_dist.method.layer import Dispatch, LocalDispatch
from ldmole_dist.method.routers import Routing
from ldmole_dist.method.sparsegen import at_least_float32
from ldmole_dist.parallel.exchange import all_to_all, exchange_counts
from ldmole_dist.parallel.placement import Placement


@dataclass
class ExpertParallel:
    """The group of ranks that the experts of a model are spread over, and what went between them.

    Args:
        group: the ranks; None where every rank holds all experts.
    """

    group: dist.ProcessGroup | None = None
    wire: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        """P."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def placement(self, num_experts: int) -> Placement:
        """What this rank holds of a bank of `num_experts` experts."""
        return Placement(num_experts, self.size, 0 if self.group is None else dist.get_rank(self.group))

    def dispatch(self) -> Dispatch:
        """How tokens and experts come together in this group."""
        return LocalDispatch() if self.group is None else AllToAllDispatch(self.group, self.wire)

    def gathered(self, local: Tensor) -> Tensor:
        """(L, ...) here and elsewhere -> (E, ...) everywhere; every rank of the group calls it."""
        if self.group is None:
            return local
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts)


class Plan(NamedTuple):
    """What moves for one input group, known to sender and receiver; computed once, replayed in a recomputation."""

    send: list[int]  # rows for each rank
    recv: list[int]  # rows from each rank
    own_counts: list[list[int]]  # active tokens of each held expert among this rank's tokens, for each linear
    recv_counts: list[list[int]]  # the same among the rows received


class AllToAllDispatch:
    """See the head of this file.

    Args:
        group: the expert-parallel group.
        wire: counter of elements sent to other ranks, by kind.
    """

    def __init__(self, group: dist.ProcessGroup, wire: Counter[str]) -> None:
        self.group, self.wire = group, wire
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def plan(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank]) -> Plan:
        """Exchange how many rows go where, and how many of them each expert gets."""
        need_TP = self._needed(supports)
        counts_PC = torch.cat(
            [need_TP.sum(0).view(-1, 1), *(s.sum(0).view(self.size, -1) for s in supports)], dim=1
        )  # one column of rows, then L of pairs for each linear
        recv_PC = exchange_counts(counts_PC, self.group, self.wire)
        rows_2P = torch.stack([counts_PC[:, 0], recv_PC[:, 0]])
        recv_PC[self.rank, 1:] = 0  # a rank's own pairs stay with its own tokens
        pairs_2C = torch.stack([counts_PC[self.rank, 1:], recv_PC[:, 1:].sum(0)])
        numbers = torch.cat([rows_2P.flatten(), pairs_2C.flatten()]).tolist()  # the one wait for the device
        send, recv = numbers[: self.size], numbers[self.size : 2 * self.size]
        own, received = _halves(numbers[2 * self.size :])
        held = [len(bank.A_LRD) for bank in banks]
        return Plan(send, recv, _split(own, held), _split(received, held))

    def __call__(
        self, x_TD: Tensor, routings: Sequence[Routing], banks: Sequence[ExpertBank], plan: Plan
    ) -> list[Tensor]:
        """See `Dispatch`. Exact: the same output and gradients as one process that holds all experts, to rounding."""
        need_TP = self._needed([routing.p_TE != 0 for routing in routings])
        destination_N, token_N = torch.nonzero_static(need_TP.t(), size=sum(plan.send)).unbind(1)
        x_ND = x_TD.index_select(0, token_N)
        # Row t P + q of (T P, L): the weights of token t for the experts of rank q.
        pair_N = token_N * self.size + destination_N
        gates_N = torch.cat(
            [r.p_TE.unflatten(1, (self.size, -1)).flatten(0, 1).index_select(0, pair_N) for r in routings], dim=1
        )
        x_MD = self._to_experts(x_ND, plan, "rows")
        gates_M = self._to_experts(gates_N, plan, "gates")

        outputs = []
        held = [len(bank.A_LRD) for bank in banks]
        for routing, bank, gates_ML, own, received in zip(
            routings, banks, gates_M.split(held, dim=1), plan.own_counts, plan.recv_counts, strict=True
        ):
            partial_MO = apply_experts(x_MD, gates_ML, bank, received)
            partial_NO = all_to_all(partial_MO, plan.recv, plan.send, self.group, self.wire, "sums")
            p_TL = routing.p_TE.unflatten(1, (self.size, -1))[:, self.rank]
            y_TO = apply_experts(x_TD, p_TL, bank, own)
            # One partial sum from each remote rank: added above half precision.
            wide = at_least_float32(y_TO.dtype)
            outputs.append(y_TO.to(wide).index_add(0, token_N, partial_NO.to(wide)).to(y_TO.dtype))
        return outputs

    def _needed(self, supports: Sequence[Tensor]) -> Tensor:
        """(T, P) bool: the remote ranks that hold an active expert of a token, for any linear of the group."""
        need_TP = torch.stack([s.unflatten(1, (self.size, -1)).any(-1) for s in supports]).any(0)
        need_TP[:, self.rank] = False
        return need_TP

    def _to_experts(self, rows: Tensor, plan: Plan, kind: str) -> Tensor:
        return all_to_all(rows, plan.send, plan.recv, self.group, self.wire, kind)


def _halves(values: list[int]) -> tuple[list[int], list[int]]:
    middle = len(values) // 2
    return values[:middle], values[middle:]


def _split(values: list[int], sizes: list[int]) -> list[list[int]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(values[start : start + size])
        start += size
    return parts
