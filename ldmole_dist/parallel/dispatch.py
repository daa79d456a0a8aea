"""Expert-parallel dispatch: tokens travel to the ranks that hold their active experts, or those experts to the tokens.

Per (rank, expert that lives elsewhere) whichever is lighter moves (`plan.cheapest_ships`). A token's row goes at most once
to each remote rank, however many of its experts live there and however many linears of the input group need it; each linear
sends its own partial sum back. Rows and experts of one group travel in the same all-to-all. No token is dropped, nothing is
padded, and every mode gives what one process with all experts would, to rounding.

What travels is under way while the caller computes something else (`Dispatch.start`), and the partial sums on their way back
while the experts here compute. An expert that travels is kept for the backward, as every saved tensor is, and so are rows,
unless they travel in rounds (`rounds`); a recomputed forward fetches both again.

Shapes: T tokens on this rank, D in-features, O out-features, E experts in all, L experts held here, R LoRA rank, P ranks
of the expert-parallel group, G linears in the input group, N rows sent, M rows received, W experts here, own and lent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldmole_dist.method.experts import ExpertBank, apply_experts
from ldmole_dist.method.layer import Dispatch, Finish, LocalDispatch
from ldmole_dist.method.routers import Routing
from ldmole_dist.method.sparsegen import at_least_float32
from ldmole_dist.parallel.exchange import Parcel, exchange_counts, send
from ldmole_dist.parallel.placement import Placement
from ldmole_dist.parallel.plan import GroupSizes, cheapest_ships, number_of_rounds
from ldmole_dist.parallel.rounds import Rows, in_rounds
from ldmole_dist.parallel.wire import Tally, Wire

Mode = Literal["auto", "all_to_all", "gather"]


@dataclass
class ExpertParallel:
    """The group of ranks that the experts of a model are spread over, and what went between them.

    Args:
        group: the ranks; None where every rank holds all experts.
        mode: "auto" moves whichever is lighter, "all_to_all" always the tokens, "gather" always the experts.
        overlap: whether what travels is under way while the frozen linears compute.
    """

    group: dist.ProcessGroup | None = None
    mode: Mode = "auto"
    overlap: bool = True
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
        return LocalDispatch() if self.group is None else ExpertParallelDispatch(self)

    def gathered(self, local: Tensor) -> Tensor:
        """(L, ...) here and elsewhere -> (E, ...) everywhere; every rank of the group calls it."""
        if self.group is None:
            return local
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts)


class Plan(NamedTuple):
    """What moves for one input group, known to sender and receiver; made once, carried out again in a recomputation.

    `*_rows` are numbers of rows for (or from) each rank, of the union and of each linear; `*_ships` numbers of experts of
    each linear for (or from) each rank; `*_counts` active tokens of each expert of each linear.
    """

    group: str  # name of the input group
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
    rounds: int  # that the rows travel in; the same on every rank of the group


class ExpertParallelDispatch:
    """See the head of this file.

    Args:
        parallel: the expert-parallel group, what may move, and where it is counted.
    """

    def __init__(self, parallel: ExpertParallel) -> None:
        assert parallel.group is not None, "without a group nothing is dispatched"
        self.group, self.wire = parallel.group, parallel.wire
        self.mode, self.overlap = parallel.mode, parallel.overlap
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def plan(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> Plan:
        """Decide what moves and tell every rank what will come from here and what is wanted of it."""
        with self.wire.clock.measured("deciding", supports[0].device):
            return self._plan(supports, banks, name)

    def _plan(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> Plan:
        support_GTPL = torch.stack([s.unflatten(1, (self.size, -1)) for s in supports])
        shipped_PGL = self._ships(support_GTPL, banks)
        need_GTP = self._needed(support_GTPL, shipped_PGL)
        pairs_PGL = support_GTPL.sum(1).transpose(0, 1)
        # To each rank: rows of each linear, for each of its experts the pairs or -1 for "send it here", and, to all the
        # same, the rows of the union to every rank, so that all know who gets how many.
        rows_P = need_GTP.any(0).sum(0)
        counts_PC = torch.cat(
            [need_GTP.sum(1).t(), pairs_PGL.masked_fill(shipped_PGL, -1).flatten(1), rows_P.expand(self.size, -1)],
            dim=1,
        )
        received_PC = exchange_counts(counts_PC, self.group, Tally(self.wire, name))
        G, L = len(supports), len(banks[0].A_LRD)
        recv_PG, wanted, rows_PP = received_PC.split([G, G * L, self.size], dim=1)
        wanted_PGL = wanted.unflatten(1, (G, L))
        lent_PGL = wanted_PGL == -1
        recv_PGL = wanted_PGL.clamp_min(0)
        recv_PGL[self.rank] = 0
        tables = [rows_PP, counts_PC[:, :G], recv_PG, shipped_PGL, lent_PGL, recv_PGL.sum(0), pairs_PGL]
        flat = torch.cat([table.flatten() for table in tables]).cpu()  # the one wait for the device
        parts = flat.split([table.numel() for table in tables])
        rows, sent, recv, shipped, lent, recv_counts, pairs = [
            part.view(table.shape).tolist() for part, table in zip(parts, tables, strict=True)
        ]
        return Plan(
            name,
            shipped_PGL,
            lent_PGL,
            send_rows=rows[self.rank],
            recv_rows=[of_rank[self.rank] for of_rank in rows],
            send_linear_rows=[[of_rank[g] for of_rank in sent] for g in range(G)],
            recv_linear_rows=[[of_rank[g] for of_rank in recv] for g in range(G)],
            send_ships=[[sum(of_rank[g]) for of_rank in lent] for g in range(G)],
            recv_ships=[[sum(of_rank[g]) for of_rank in shipped] for g in range(G)],
            here_counts=[
                [pairs[q][g][e] for q in range(self.size) for e in range(L) if shipped[q][g][e] or q == self.rank]
                for g in range(G)
            ],
            recv_counts=recv_counts,
            rounds=number_of_rounds(rows),
        )

    def start(
        self,
        x_TD: Tensor,
        routings: Sequence[Routing],
        banks: Sequence[ExpertBank],
        plan: Plan,
        repeated: bool = False,
    ) -> Finish:
        """See `Dispatch`."""
        tally = Tally(self.wire, plan.group, repeated)
        p_GTPL = [routing.p_TE.unflatten(1, (self.size, -1)) for routing in routings]
        need_GTP = self._needed(torch.stack([p != 0 for p in p_GTPL]), plan.shipped_PGL)
        destination_N, token_N = torch.nonzero_static(need_GTP.any(0).t(), size=sum(plan.send_rows)).unbind(1)
        gates_N = [
            # Row t P + q of (T P, L): the weights of token t at the experts of rank q; those that come here do not go along.
            p.masked_fill(plan.shipped_PGL[:, g], 0).flatten(0, 1).index_select(0, token_N * self.size + destination_N)
            for g, p in enumerate(p_GTPL)
        ]
        rows = Rows(x_TD, torch.cat(gates_N, dim=1), token_N, plan.send_rows, plan.recv_rows)
        parcels = [
            Parcel("weights", self._lent(bank, plan.lent_PGL[:, g], x_TD.dtype, sum(plan.send_ships[g])), *ways)
            for g, (bank, *ways) in enumerate(zip(banks, plan.send_ships, plan.recv_ships, strict=True))
        ]
        if plan.rounds == 1:
            parcels += rows.parcels()
        sent = send(parcels, self.group, tally, self.overlap)

        def finish() -> list[Tensor]:
            arrived = sent.arrived()
            weights, came = arrived[: len(banks)], arrived[len(banks) :]
            if plan.rounds > 1:
                outputs = self._outputs(x_TD, p_GTPL, banks, weights, plan)
                order_N, returned = in_rounds(rows, banks, plan.rounds, self.group, tally)
                tokens = [order_N] * len(banks)
            else:
                x_MD, gates = came
                sums = self._sums(x_MD, gates, banks, plan)
                ways = zip(sums, plan.recv_linear_rows, plan.send_linear_rows, strict=True)
                back = send([Parcel("sums", *way) for way in ways], self.group, tally, self.overlap)
                outputs = self._outputs(x_TD, p_GTPL, banks, weights, plan)
                tokens = [
                    torch.nonzero_static(need_TP.t(), size=sum(of_linear))[:, 1]
                    for need_TP, of_linear in zip(need_GTP, plan.send_linear_rows, strict=True)
                ]
                returned = back.arrived()
            return [_Added.apply(*parts) for parts in zip(outputs, tokens, returned, strict=True)]

        return finish

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
        _, rank, in_features = bank.A_LRD.shape
        A, B = weights.split([rank * in_features, weights.shape[1] - rank * in_features], dim=1)
        A, B = A.unflatten(1, (rank, in_features)), B.unflatten(1, (-1, rank))
        here_PL = shipped_PL.clone()
        here_PL[self.rank] = True
        index_W = torch.nonzero_static(here_PL.flatten(), size=len(weights) + len(bank.A_LRD))[:, 0]
        A_WRD = torch.cat([A[:before], bank.A_LRD.to(A.dtype), A[before:]])
        B_WOR = torch.cat([B[:before], bank.B_LOR.to(B.dtype), B[before:]])
        return p_TPL.flatten(1).index_select(1, index_W), ExpertBank(A_WRD, B_WOR, bank.scaling)

    def _outputs(
        self,
        x_TD: Tensor,
        p_GTPL: Sequence[Tensor],
        banks: Sequence[ExpertBank],
        weights: Sequence[Tensor],
        plan: Plan,
    ) -> list[Tensor]:
        """For each linear the weighted sum (T, O) of the experts that are here, own and lent."""
        outputs = []
        for g, bank in enumerate(banks):
            before = sum(plan.recv_ships[g][: self.rank])
            # In rounds nothing else came with the experts: their gradients must be sent even where there are none.
            if len(weights[g]) or plan.rounds > 1:
                p_TW, bank_W = self._here(p_GTPL[g], plan.shipped_PGL[:, g], bank, weights[g], before)
            else:
                p_TW, bank_W = p_GTPL[g][:, self.rank], bank
            outputs.append(apply_experts(x_TD, p_TW, bank_W, plan.here_counts[g]))
        return outputs

    def _sums(self, x_MD: Tensor, gates: Tensor, banks: Sequence[ExpertBank], plan: Plan) -> list[Tensor]:
        """For each linear the held experts' weighted sums of the rows that came for it, in their order."""
        sums = []
        for g, (bank, gates_ML) in enumerate(
            zip(banks, gates.split([len(b.A_LRD) for b in banks], dim=1), strict=True)
        ):
            y_MO = apply_experts(x_MD, gates_ML, bank, plan.recv_counts[g])
            number = sum(plan.recv_linear_rows[g])
            if number < len(y_MO):
                y_MO = y_MO.index_select(0, torch.nonzero_static((gates_ML != 0).any(1), size=number)[:, 0])
            sums.append(y_MO)
        return sums


class _Added(torch.autograd.Function):
    """One partial sum from each remote rank, added above half precision; also where none came, as the ranks that sent them wait
    for their gradients. Keeps whose the sums are; torch's index_add would keep the sums too."""

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, token_N: Tensor, returned_NO: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        ctx.dtype = returned_NO.dtype
        wide = at_least_float32(y_TO.dtype) if len(token_N) else y_TO.dtype
        if wide == y_TO.dtype:
            ctx.mark_dirty(y_TO)
        return y_TO.to(wide).index_add_(0, token_N, returned_NO.to(wide)).to(y_TO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, None, Tensor]:
        (token_N,) = ctx.saved_tensors
        return grad_TO, None, grad_TO.index_select(0, token_N).to(ctx.dtype)
