"""Expert-parallel dispatch: bring tokens and their active experts together across ranks.

For each (rank, remote expert), mode "auto" sends the token rows to the expert's rank or the expert to the tokens' rank, so that
the total cost is low (`decision.choose_fetched_experts`). A token's row is sent at most once to each remote rank, even if
several of its experts are there or several linears of the input group need it; the remote rank returns one partial sum per
linear. Rows and experts of one group share an all-to-all, unless the rows are exchanged in rounds (`rounds`). No token is
dropped and nothing is padded. Every mode gives the result of one process that holds all experts, up to rounding.

The all-to-all is in flight while the caller computes something else (`Dispatch.start`), and the partial sums are returned
while the local experts compute. Fetched experts are kept for the backward. Received rows are kept as well, unless they are
exchanged in rounds. A recomputed forward exchanges experts and rows again.

Shapes: T tokens on this rank, D in-features, O out-features, E experts in total, L experts held by this rank, R LoRA rank, P
ranks of the expert-parallel group, G linears in the input group, N rows sent, M rows received, W experts computed here for this
rank's tokens, own and fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldmole_dist.method.experts import ExpertBank, apply_experts
from ldmole_dist.method.layer import Dispatch, Finish, LocalDispatch
from ldmole_dist.method.routers import Routing
from ldmole_dist.method.sparsegen import at_least_float32
from ldmole_dist.parallel.decision import DispatchDecision, GroupSizes, choose_fetched_experts, number_of_rounds
from ldmole_dist.parallel.exchange import Payload, exchange_counts, start_exchange
from ldmole_dist.parallel.placement import Placement
from ldmole_dist.parallel.rounds import Rows, exchange_in_rounds
from ldmole_dist.parallel.wire import Tally, Wire

Mode = Literal["auto", "all_to_all", "gather"]


@dataclass
class ExpertParallel:
    """The ranks that share the experts of a model, how they exchange tokens and experts, and counters of what this rank sends.

    Args:
        group: process group of these ranks; None if every rank holds all experts.
        mode: "auto" chooses rows or the expert for each remote expert, "all_to_all" always sends rows, "gather" always experts.
        overlap: whether an all-to-all is in flight while the frozen linears or the local experts compute.
        wire: counters of the elements and bytes that this rank sends.
    """

    group: dist.ProcessGroup | None = None
    mode: Mode = "auto"
    overlap: bool = True
    wire: Wire = field(default_factory=Wire)

    @property
    def size(self) -> int:
        """P, the number of ranks in the group; 1 without a group."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def placement(self, num_experts: int) -> Placement:
        """Return which of a bank's `num_experts` experts this rank holds. Raises ValueError if `size` does not divide it."""
        return Placement(num_experts, self.size, 0 if self.group is None else dist.get_rank(self.group))

    def dispatch(self) -> Dispatch:
        """Return a new `Dispatch` for an adapted linear; it communicates only if the experts are spread over a group."""
        return LocalDispatch() if self.group is None else ExpertParallelDispatch(self)

    def all_gather(self, local: Tensor) -> Tensor:
        """Return the (L, ...) tensors of all ranks as one (E, ...) tensor. Collective: every rank of the group must call it."""
        if self.group is None:
            return local
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts)


class ExpertParallelDispatch:
    """Dispatch over the ranks of an expert-parallel group; see the module docstring.

    Args:
        parallel: expert-parallel group, mode and counters to use.
    """

    def __init__(self, parallel: ExpertParallel) -> None:
        assert parallel.group is not None, "without a group, use LocalDispatch"
        self.group, self.wire = parallel.group, parallel.wire
        self.mode, self.overlap = parallel.mode, parallel.overlap
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def decide(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> DispatchDecision:
        """Decide what to send, and exchange the counts that the receivers need. See `Dispatch`."""
        with self.wire.clock.measure("deciding", supports[0].device):
            return self._decide(supports, banks, name)

    def _decide(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> DispatchDecision:
        support_GTPL = torch.stack([s.unflatten(1, (self.size, -1)) for s in supports])
        fetched_PGL = self._fetched(support_GTPL, banks)
        need_GTP = self._needed(support_GTPL, fetched_PGL)
        pairs_PGL = support_GTPL.sum(1).transpose(0, 1)
        # Counts for each rank: the rows for each linear; the active pairs of each of its experts, or -1 to request the expert;
        # and the rows for every rank, from which all ranks compute the same number of rounds.
        rows_P = need_GTP.any(0).sum(0)
        counts_PC = torch.cat(
            [need_GTP.sum(1).t(), pairs_PGL.masked_fill(fetched_PGL, -1).flatten(1), rows_P.expand(self.size, -1)],
            dim=1,
        )
        received_PC = exchange_counts(counts_PC, self.group, Tally(self.wire, name))
        G, L = len(supports), len(banks[0].A_LRD)
        recv_PG, requested, rows_PP = received_PC.split([G, G * L, self.size], dim=1)
        requested_PGL = requested.unflatten(1, (G, L))
        sent_PGL = requested_PGL == -1
        recv_PGL = requested_PGL.clamp_min(0)
        recv_PGL[self.rank] = 0
        # One copy to the host for all tables: each copy synchronizes the device.
        tables = [rows_PP, counts_PC[:, :G], recv_PG, fetched_PGL, sent_PGL, recv_PGL.sum(0), pairs_PGL]
        flat = torch.cat([table.flatten() for table in tables]).cpu()
        parts = flat.split([table.numel() for table in tables])
        rows, send, recv, fetched, sent, recv_counts, pairs = [
            part.view(table.shape).tolist() for part, table in zip(parts, tables, strict=True)
        ]
        return DispatchDecision(
            name,
            fetched_PGL,
            sent_PGL,
            send_rows=rows[self.rank],
            recv_rows=[of_rank[self.rank] for of_rank in rows],
            send_linear_rows=[[of_rank[g] for of_rank in send] for g in range(G)],
            recv_linear_rows=[[of_rank[g] for of_rank in recv] for g in range(G)],
            send_experts=[[sum(of_rank[g]) for of_rank in sent] for g in range(G)],
            recv_experts=[[sum(of_rank[g]) for of_rank in fetched] for g in range(G)],
            here_counts=[
                [pairs[q][g][e] for q in range(self.size) for e in range(L) if fetched[q][g][e] or q == self.rank]
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
        decision: DispatchDecision,
        repeated: bool = False,
    ) -> Finish:
        """Start the exchange of rows and experts. See `Dispatch`."""
        tally = Tally(self.wire, decision.group, repeated)
        p_GTPL = [routing.p_TE.unflatten(1, (self.size, -1)) for routing in routings]
        need_GTP = self._needed(torch.stack([p != 0 for p in p_GTPL]), decision.fetched_PGL)
        destination_N, token_N = torch.nonzero_static(need_GTP.any(0).t(), size=sum(decision.send_rows)).unbind(1)
        gates_N = [
            # Row t P + q of (T P, L): the weights of token t for the experts of rank q, without those of fetched experts.
            p.masked_fill(decision.fetched_PGL[:, g], 0)
            .flatten(0, 1)
            .index_select(0, token_N * self.size + destination_N)
            for g, p in enumerate(p_GTPL)
        ]
        rows = Rows(x_TD, torch.cat(gates_N, dim=1), token_N, decision.send_rows, decision.recv_rows)
        payloads = [
            Payload("weights", self._sent(bank, decision.sent_PGL[:, g], x_TD.dtype, sum(send)), send, recv)
            for g, (bank, send, recv) in enumerate(
                zip(banks, decision.send_experts, decision.recv_experts, strict=True)
            )
        ]
        if decision.rounds == 1:
            payloads += rows.payloads()
        pending = start_exchange(payloads, self.group, tally, self.overlap)

        def finish() -> list[Tensor]:
            received = pending.wait()
            weights, received_rows = received[: len(banks)], received[len(banks) :]
            if decision.rounds > 1:
                outputs = self._outputs(x_TD, p_GTPL, banks, weights, decision)
                order_N, returned = exchange_in_rounds(rows, banks, decision.rounds, self.group, tally)
                tokens = [order_N] * len(banks)
            else:
                x_MD, gates = received_rows
                sums = self._sums(x_MD, gates, banks, decision)
                counts = zip(sums, decision.recv_linear_rows, decision.send_linear_rows, strict=True)
                returning = start_exchange([Payload("sums", *c) for c in counts], self.group, tally, self.overlap)
                outputs = self._outputs(x_TD, p_GTPL, banks, weights, decision)
                tokens = [
                    torch.nonzero_static(need_TP.t(), size=sum(of_linear))[:, 1]
                    for need_TP, of_linear in zip(need_GTP, decision.send_linear_rows, strict=True)
                ]
                returned = returning.wait()
            return [_AddSums.apply(*parts) for parts in zip(outputs, tokens, returned, strict=True)]

        return finish

    def _fetched(self, support_GTPL: Tensor, banks: Sequence[ExpertBank]) -> Tensor:
        """Return (P, G, L) bool: the remote experts that this rank fetches."""
        G, _, P, L = support_GTPL.shape
        if self.mode == "auto":
            _, outs, ranks = zip(*(bank.B_LOR.shape for bank in banks), strict=True)
            sizes = GroupSizes(banks[0].A_LRD.shape[2], outs, ranks, L)
            return choose_fetched_experts(support_GTPL, self.rank, sizes)
        fetched_PGL = torch.full((P, G, L), self.mode == "gather", device=support_GTPL.device)
        fetched_PGL[self.rank] = False
        return fetched_PGL

    def _needed(self, support_GTPL: Tensor, fetched_PGL: Tensor) -> Tensor:
        """Return (G, T, P) bool: for each linear and token, the remote ranks that need the token's row."""
        need_GTP = (support_GTPL & ~fetched_PGL.transpose(0, 1).unsqueeze(1)).any(-1)
        need_GTP[:, :, self.rank] = False
        return need_GTP

    def _sent(self, bank: ExpertBank, sent_PL: Tensor, dtype: torch.dtype, number: int) -> Tensor:
        """Return one row for each expert to send, A and B concatenated, in order of destination.

        The rows have the dtype of the activations, in which the receiver computes. Autograd sums the gradients of an expert
        in the dtype of the bank.
        """
        expert = torch.nonzero_static(sent_PL, size=number)[:, 1]
        A, B = bank.A_LRD.index_select(0, expert), bank.B_LOR.index_select(0, expert)
        return torch.cat([A.flatten(1), B.flatten(1)], dim=1).to(dtype)

    def _computed_here(
        self, p_TPL: Tensor, fetched_PL: Tensor, bank: ExpertBank, weights: Tensor, before: int
    ) -> tuple[Tensor, ExpertBank]:
        """Return the routing weights (T, W) and the bank of the experts computed here, own and fetched.

        Both are in order of expert index, so that experts are summed in the same order as in a single process.

        Args:
            p_TPL: routing weights of this rank's tokens.
            fetched_PL: bool, the fetched experts.
            bank: this rank's own experts.
            weights: one row for each fetched expert, A and B flattened and concatenated.
            before: number of fetched experts with a lower index than the own ones.
        """
        _, lora_rank, in_features = bank.A_LRD.shape
        A, B = weights.split([lora_rank * in_features, weights.shape[1] - lora_rank * in_features], dim=1)
        A, B = A.unflatten(1, (lora_rank, in_features)), B.unflatten(1, (-1, lora_rank))
        here_PL = fetched_PL.clone()
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
        decision: DispatchDecision,
    ) -> list[Tensor]:
        """Return, for each linear, the weighted sum (T, O) of the own and the fetched experts for this rank's tokens."""
        outputs = []
        for g, bank in enumerate(banks):
            before = sum(decision.recv_experts[g][: self.rank])
            # With several rounds, the all-to-all of `start` carries only experts. It must be part of the graph even if this
            # rank fetches none: otherwise this rank would skip the all-to-all of the gradients, in which the others wait.
            if len(weights[g]) or decision.rounds > 1:
                p_TW, bank_W = self._computed_here(p_GTPL[g], decision.fetched_PGL[:, g], bank, weights[g], before)
            else:
                p_TW, bank_W = p_GTPL[g][:, self.rank], bank
            outputs.append(apply_experts(x_TD, p_TW, bank_W, decision.here_counts[g]))
        return outputs

    def _sums(
        self, x_MD: Tensor, gates: Tensor, banks: Sequence[ExpertBank], decision: DispatchDecision
    ) -> list[Tensor]:
        """Return, for each linear, this rank's weighted sums of its own experts for the received rows that the linear needs.

        The sums are in the order of the received rows.
        """
        sums = []
        for g, (bank, gates_ML) in enumerate(
            zip(banks, gates.split([len(b.A_LRD) for b in banks], dim=1), strict=True)
        ):
            y_MO = apply_experts(x_MD, gates_ML, bank, decision.recv_counts[g])
            number = sum(decision.recv_linear_rows[g])
            if number < len(y_MO):
                y_MO = y_MO.index_select(0, torch.nonzero_static((gates_ML != 0).any(1), size=number)[:, 0])
            sums.append(y_MO)
        return sums


class _AddSums(torch.autograd.Function):
    """Add the partial sums returned by remote ranks to the local output, in at least float32.

    Apply it even if this rank receives no sums: it connects the exchange of the sums to the graph, and the backward of the
    exchange is collective. It saves only the token index of each sum, whereas torch's index_add would also save the sums.
    """

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, token_N: Tensor, returned_NO: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        ctx.dtype = returned_NO.dtype
        wide = at_least_float32(y_TO.dtype) if len(token_N) else y_TO.dtype
        if wide == y_TO.dtype:
            ctx.mark_dirty(y_TO)  # .to() below returns y itself, and index_add_ changes it in place
        return y_TO.to(wide).index_add_(0, token_N, returned_NO.to(wide)).to(y_TO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, None, Tensor]:
        (token_N,) = ctx.saved_tensors
        return grad_TO, None, grad_TO.index_select(0, token_N).to(ctx.dtype)
