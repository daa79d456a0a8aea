"""Expert-parallel dispatch: tokens travel to the ranks that hold their active experts, or those experts to the tokens.

Per (rank, expert that lives elsewhere) whichever is lighter moves (`plan.cheapest_ships`). A token's row goes at most once
to each remote rank, however many of its experts live there and however many linears of the input group need it; each linear
sends its own partial sum back. Rows and experts of one group travel in the same all-to-all. No token is dropped, nothing is
padded, and every mode gives what one process with all experts would, to rounding.

An expert that travels is kept for the backward, as every saved tensor is; a recomputed forward fetches it again.

Shapes: T tokens on this rank, D in-features, O out-features, E experts in all, L experts held here, R LoRA rank, P ranks
of the expert-parallel group, G linears in the input group, N rows sent, M rows received, W experts here, own and lent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.method.experts import ExpertBank, apply_experts
from ldmole_dist.method.layer import Dispatch, LocalDispatch
from ldmole_dist.method.routers import Routing
from ldmole_dist.method.sparsegen import at_least_float32
from ldmole_dist.parallel.exchange import Parcel, Wire, exchange, exchange_counts
from ldmole_dist.parallel.placement import Placement
from ldmole_dist.parallel.plan import GroupSizes, cheapest_ships

Mode = Literal["auto", "all_to_all", "gather"]


@dataclass
class ExpertParallel:
    """The group of ranks that the experts of a model are spread over, and what went between them.

    Args:
        group: the ranks; None where every rank holds all experts.
        mode: "auto" moves whichever is lighter, "all_to_all" always the tokens, "gather" always the experts.
    """

    group: dist.ProcessGroup | None = None
    mode: Mode = "auto"
    wire: Wire = field(default_factory=Wire)

    @property
    def size(self) -> int:
        """P."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def placement(self, num_experts: int) -> Placement:
        """What this rank holds of a bank of `num_experts` experts."""
        return Placement(num_experts, self.size, 0 if self.group is None else dist.get_rank(self.group))

    def dispatch(self) -> Dispatch:
        """How tokens and experts come together in this group."""
        return LocalDispatch() if self.group is None else ExpertParallelDispatch(self.group, self.wire, self.mode)

    def gathered(self, local: Tensor) -> Tensor:
        """(L, ...) here and elsewhere -> (E, ...) everywhere; every rank of the group calls it."""
        if self.group is None:
            return local
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts)


class Plan(NamedTuple):
    """What moves for one input group, known to sender and receiver; computed once, replayed in a recomputation.

    `*_rows` are numbers of rows for (or from) each rank, of the union and of each linear; `*_ships` numbers of experts of
    each linear for (or from) each rank; `*_counts` active tokens of each expert of each linear.
    """

    shipped_PGL: Tensor  # experts that come here
    lent_PGL: Tensor  # experts that go elsewhere
    send_rows: list[int]
    recv_rows: list[int]
    send_linear_rows: list[list[int]]
    recv_linear_rows: list[list[int]]
    send_ships: list[list[int]]
    recv_ships: list[list[int]]
    here_counts: list[list[int]]  # this rank's tokens at its own experts and those that come here, by index
    recv_counts: list[list[int]]  # the rows received, at its own experts


class ExpertParallelDispatch:
    """See the head of this file.

    Args:
        group: the expert-parallel group.
        wire: where elements sent to other ranks are counted.
        mode: what may move.
    """

    def __init__(self, group: dist.ProcessGroup, wire: Wire, mode: Mode = "auto") -> None:
        self.group, self.wire, self.mode = group, wire, mode
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def plan(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank]) -> Plan:
        """Decide what moves and tell every rank what will come from here and what is wanted of it."""
        support_GTPL = torch.stack([s.unflatten(1, (self.size, -1)) for s in supports])
        shipped_PGL = self._ships(support_GTPL, banks)
        need_GTP = self._needed(support_GTPL, shipped_PGL)
        pairs_PGL = support_GTPL.sum(1).transpose(0, 1)
        # To each rank: rows of the union, of each linear, and for each of its experts the pairs, or -1 for "send it here".
        counts_PC = torch.cat(
            [
                need_GTP.any(0).sum(0).unsqueeze(1),
                need_GTP.sum(1).t(),
                pairs_PGL.masked_fill(shipped_PGL, -1).flatten(1),
            ],
            dim=1,
        )
        received_PC = exchange_counts(counts_PC, self.group, self.wire)
        G, L = len(supports), len(banks[0].A_LRD)
        wanted_PGL = received_PC[:, 1 + G :].unflatten(1, (G, L))
        lent_PGL = wanted_PGL == -1
        recv_GL = wanted_PGL.clamp_min(0).index_fill(0, _index(self.rank, wanted_PGL), 0).sum(0)
        tables = [counts_PC[:, : 1 + G], received_PC[:, : 1 + G], shipped_PGL, lent_PGL, recv_GL, pairs_PGL]
        flat = torch.cat([table.flatten() for table in tables]).cpu()  # the one wait for the device
        parts = flat.split([table.numel() for table in tables])
        sent, recv, shipped, lent, recv_counts, pairs = [
            part.view(table.shape).tolist() for part, table in zip(parts, tables, strict=True)
        ]
        return Plan(
            shipped_PGL,
            lent_PGL,
            send_rows=[row[0] for row in sent],
            recv_rows=[row[0] for row in recv],
            send_linear_rows=[[row[1 + g] for row in sent] for g in range(G)],
            recv_linear_rows=[[row[1 + g] for row in recv] for g in range(G)],
            send_ships=[[sum(of_rank[g]) for of_rank in lent] for g in range(G)],
            recv_ships=[[sum(of_rank[g]) for of_rank in shipped] for g in range(G)],
            here_counts=[
                [pairs[q][g][e] for q in range(self.size) for e in range(L) if shipped[q][g][e] or q == self.rank]
                for g in range(G)
            ],
            recv_counts=recv_counts,
        )

    def __call__(
        self, x_TD: Tensor, routings: Sequence[Routing], banks: Sequence[ExpertBank], plan: Plan
    ) -> list[Tensor]:
        """See `Dispatch`."""
        p_GTPL = [routing.p_TE.unflatten(1, (self.size, -1)) for routing in routings]
        need_GTP = self._needed(torch.stack([p != 0 for p in p_GTPL]), plan.shipped_PGL)
        destination_N, token_N = torch.nonzero_static(need_GTP.any(0).t(), size=sum(plan.send_rows)).unbind(1)
        gates_N = [
            # Row t P + q of (T P, L): the weights of token t at the experts of rank q; those that come here do not go along.
            p.masked_fill(plan.shipped_PGL[:, g], 0).flatten(0, 1).index_select(0, token_N * self.size + destination_N)
            for g, p in enumerate(p_GTPL)
        ]
        rows = [("rows", x_TD.index_select(0, token_N)), ("gates", torch.cat(gates_N, dim=1))]
        parcels = [Parcel(kind, value, plan.send_rows, plan.recv_rows) for kind, value in rows]
        parcels += [
            Parcel("weights", self._lent(bank, plan.lent_PGL[:, g], x_TD.dtype, sum(plan.send_ships[g])), *ways)
            for g, (bank, *ways) in enumerate(zip(banks, plan.send_ships, plan.recv_ships, strict=True))
        ]
        x_MD, gates_M, *weights = exchange(parcels, self.group, self.wire)

        gates = gates_M.split([len(bank.A_LRD) for bank in banks], dim=1)
        sums = [
            self._sums(x_MD, gates[g], bank, plan.recv_counts[g], sum(plan.recv_linear_rows[g]))
            for g, bank in enumerate(banks)
        ]
        returned = exchange(
            [Parcel("sums", sums[g], plan.recv_linear_rows[g], plan.send_linear_rows[g]) for g in range(len(banks))],
            self.group,
            self.wire,
        )
        outputs = []
        for g, bank in enumerate(banks):
            before = sum(plan.recv_ships[g][: self.rank])
            p_TW, bank_W = self._here(p_GTPL[g], plan.shipped_PGL[:, g], bank, weights[g], before)
            y_TO = apply_experts(x_TD, p_TW, bank_W, plan.here_counts[g])
            token_S = torch.nonzero_static(need_GTP[g].t(), size=len(returned[g]))[:, 1]
            # One partial sum from each remote rank: added above half precision.
            wide = at_least_float32(y_TO.dtype)
            outputs.append(y_TO.to(wide).index_add(0, token_S, returned[g].to(wide)).to(y_TO.dtype))
        return outputs

    def _ships(self, support_GTPL: Tensor, banks: Sequence[ExpertBank]) -> Tensor:
        """(P, G, L) bool: the experts that come here."""
        G, _, P, L = support_GTPL.shape
        if self.mode == "auto":
            _, rank, in_features = banks[0].A_LRD.shape
            sizes = GroupSizes(in_features, tuple(bank.B_LOR.shape[1] for bank in banks), rank, L)
            return cheapest_ships(support_GTPL, self.rank, sizes)
        shipped_PGL = torch.full((P, G, L), self.mode == "gather", device=support_GTPL.device)
        shipped_PGL[self.rank] = False
        return shipped_PGL

    def _needed(self, support_GTPL: Tensor, shipped_PGL: Tensor) -> Tensor:
        """(G, T, P) bool: the remote ranks that a token's row must go to, for each linear."""
        need_GTP = (support_GTPL & ~shipped_PGL.transpose(0, 1).unsqueeze(1)).any(-1)
        need_GTP[:, :, self.rank] = False
        return need_GTP

    def _lent(self, bank: ExpertBank, lent_PL: Tensor, dtype: torch.dtype, number: int) -> Tensor:
        """One row for each expert that goes elsewhere, A and B behind each other, in order of destination. In the dtype of
        the activations, which it is computed in; its gradients are added up in that of the bank."""
        expert = torch.nonzero_static(lent_PL, size=number)[:, 1]
        A, B = bank.A_LRD.index_select(0, expert), bank.B_LOR.index_select(0, expert)
        return torch.cat([A.flatten(1), B.flatten(1)], dim=1).to(dtype)

    def _here(
        self, p_TPL: Tensor, shipped_PL: Tensor, bank: ExpertBank, weights: Tensor, before: int
    ) -> tuple[Tensor, ExpertBank]:
        """The experts that are here, `before` of those that came ahead of the own ones, and the weights of this rank's tokens
        for them. In order of their index: with all of them here a sum is formed as one process forms it."""
        if len(weights) == 0:
            return p_TPL[:, self.rank], bank
        _, rank, in_features = bank.A_LRD.shape
        A, B = weights.split([rank * in_features, weights.shape[1] - rank * in_features], dim=1)
        A, B = A.unflatten(1, (rank, in_features)), B.unflatten(1, (-1, rank))
        here_PL = shipped_PL.index_fill(0, _index(self.rank, shipped_PL), True)
        index_W = torch.nonzero_static(here_PL.flatten(), size=len(weights) + len(bank.A_LRD))[:, 0]
        A_WRD = torch.cat([A[:before], bank.A_LRD.to(A.dtype), A[before:]])
        B_WOR = torch.cat([B[:before], bank.B_LOR.to(B.dtype), B[before:]])
        return p_TPL.flatten(1).index_select(1, index_W), ExpertBank(A_WRD, B_WOR, bank.scaling)

    def _sums(self, x_MD: Tensor, gates_ML: Tensor, bank: ExpertBank, counts: list[int], number: int) -> Tensor:
        """The held experts' weighted sums of the rows that came for this linear, in their order."""
        y_MO = apply_experts(x_MD, gates_ML, bank, counts)
        if number == len(y_MO):
            return y_MO
        return y_MO.index_select(0, torch.nonzero_static((gates_ML != 0).any(1), size=number)[:, 0])


def _index(value: int, like: Tensor) -> Tensor:
    return torch.tensor([value], device=like.device)
