"""Exchange of rows in several rounds, which limits the memory of a rank that receives many more rows than the others.

Each round exchanges an equal part of the rows for each rank, computes the experts and returns the sums. The received rows are
not kept for the backward, which fetches them again ("again_rows" in `wire.KINDS`), so that a rank holds the received rows of
one round at a time.

Shapes: T tokens on this rank, D in-features, O out-features, L experts held by each rank, G linears in the input group, N rows
sent and M rows received by this rank; n and m are those of one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldmole_dist.method.experts import ExpertBank, apply_experts
from ldmole_dist.parallel.exchange import Payload, exchange
from ldmole_dist.parallel.wire import Tally


class Rows(NamedTuple):
    """Rows for every rank of the group, in order of destination.

    Args:
        x_TD: hidden states of all tokens of this rank.
        gates: (N, G L) routing weights of each row for the experts of its destination.
        token_N: token of each row, as an index into `x_TD`.
        send: number of rows for each rank.
        recv: number of rows from each rank.
    """

    x_TD: Tensor
    gates: Tensor
    token_N: Tensor
    send: list[int]
    recv: list[int]

    def payloads(self) -> list[Payload]:
        """Return the hidden states and the routing weights of the rows, as payloads of one all-to-all."""
        rows_ND = self.x_TD.index_select(0, self.token_N)
        return [Payload("rows", rows_ND, self.send, self.recv), Payload("gates", self.gates, self.send, self.recv)]

    def part(self, index: int, num_parts: int) -> Rows:
        """Return part `index` of the rows for each rank, split into `num_parts` parts of equal size up to rounding."""
        starts = accumulate(self.send, initial=0)
        positions = [
            torch.arange(
                start + n * index // num_parts, start + n * (index + 1) // num_parts, device=self.token_N.device
            )
            for start, n in zip(starts, self.send, strict=False)
        ]
        position_n = torch.cat(positions)
        # Source and destination split the same number of rows with the same formula, so no message is needed.
        recv = [n * (index + 1) // num_parts - n * index // num_parts for n in self.recv]
        send = [len(p) for p in positions]
        return Rows(self.x_TD, self.gates[position_n], self.token_N[position_n], send, recv)


def exchange_in_rounds(
    rows: Rows, banks: Sequence[ExpertBank], rounds: int, group: dist.ProcessGroup, tally: Tally
) -> tuple[Tensor, list[Tensor]]:
    """Apply the remote experts of each linear to the rows of this rank, round by round. Collective.

    Args:
        rows: rows that this rank sends.
        banks: experts held by this rank, one bank for each linear.
        rounds: number of rounds, the same on every rank.
        group: expert-parallel group.
        tally: counter of the elements sent.

    Returns:
        The token of each row, (N,), in the order of the rounds; and for each linear the partial sums of these rows, (N, O),
        which are 0 for rows that the linear does not need.
    """
    parts = [rows.part(index, rounds) for index in range(rounds)]
    returned = [_run_round(part, banks, group, tally) for part in parts]
    return torch.cat([part.token_N for part in parts]), [torch.cat(y) for y in zip(*returned, strict=True)]


def _run_round(part: Rows, banks: Sequence[ExpertBank], group: dist.ProcessGroup, tally: Tally) -> tuple[Tensor, ...]:
    """Send the rows of one round, apply the experts of each linear on the destination ranks, and return the sums, (n, O) each.

    The sums of each linear are in the order of the rows. Collective.
    """
    tallies, send, recv = iter([tally]), part.send, part.recv

    # Pass the tensors as arguments, so that an enclosing checkpoint can free them. Tensors in the closure would stay in memory
    # until the backward.
    def compute(x_TD: Tensor, gates: Tensor, token_n: Tensor) -> tuple[Tensor, ...]:
        # The first call is the forward; the second is the recomputation, whose elements are counted as repeated.
        counting = next(tallies, tally._replace(repeated=True))
        x_mD, gates_m = exchange(Rows(x_TD, gates, token_n, send, recv).payloads(), group, counting)
        gates_G = gates_m.split([len(bank.A_LRD) for bank in banks], dim=1)
        # Counting each expert's tokens of this round would synchronize the device; the fused formulation needs no counts.
        sums = [apply_experts(x_mD, gates_mL, bank, None) for gates_mL, bank in zip(gates_G, banks, strict=True)]
        return tuple(exchange([Payload("sums", s, recv, send) for s in sums], group, counting))

    return checkpoint(compute, part.x_TD, part.gates, part.token_N, use_reentrant=False, preserve_rng_state=False)
