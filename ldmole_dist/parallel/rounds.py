"""Rows that travel in rounds, because all of them at once would overload one rank.

Each round brings every rank an equal part of its rows, computes and sends the sums back. Nothing of a round is kept for the
backward, which fetches the rows of the round again ("again_rows" on the wire): a rank holds one round at a time.

Shapes: T tokens on this rank, D in-features, O out-features, L experts held here, G linears in the input group, N rows sent,
M rows received; n, m those of one round.
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
from ldmole_dist.parallel.exchange import Parcel, exchange
from ldmole_dist.parallel.wire import Tally


class Rows(NamedTuple):
    """Rows for every rank of the group, in order of destination, and how many to and from each."""

    x_TD: Tensor
    gates: Tensor  # (N, G L)
    token_N: Tensor
    send: list[int]
    recv: list[int]

    def parcels(self) -> list[Parcel]:
        """Hidden states and their weights at the experts of the rank that they go to."""
        rows_ND = self.x_TD.index_select(0, self.token_N)
        return [Parcel("rows", rows_ND, self.send, self.recv), Parcel("gates", self.gates, self.send, self.recv)]

    def part(self, index: int, of: int) -> Rows:
        """Part `index` of `of` equal ones of the rows for each rank."""
        starts = accumulate(self.send, initial=0)
        positions = [
            torch.arange(start + n * index // of, start + n * (index + 1) // of, device=self.token_N.device)
            for start, n in zip(starts, self.send, strict=False)
        ]
        position_n = torch.cat(positions)
        recv = [n * (index + 1) // of - n * index // of for n in self.recv]
        send = [len(p) for p in positions]
        return Rows(self.x_TD, self.gates[position_n], self.token_N[position_n], send, recv)


def in_rounds(
    rows: Rows, banks: Sequence[ExpertBank], rounds: int, group: dist.ProcessGroup, tally: Tally
) -> tuple[Tensor, list[Tensor]]:
    """What the remote experts of each linear say to this rank's rows.

    Args:
        rows: of this rank.
        banks: held here, of each linear.
        rounds: the same on every rank.
        group: the expert-parallel group.
        tally: where the elements are counted.

    Returns:
        The token of each row, in the order of the rounds, and for each linear (N, O), 0 where it needs nothing of a row.
    """
    parts = [rows.part(index, rounds) for index in range(rounds)]
    returned = [_carried(part, banks, group, tally) for part in parts]
    return torch.cat([part.token_N for part in parts]), [torch.cat(y) for y in zip(*returned, strict=True)]


def _carried(part: Rows, banks: Sequence[ExpertBank], group: dist.ProcessGroup, tally: Tally) -> tuple[Tensor, ...]:
    tallies, send, recv = iter([tally]), part.send, part.recv

    # It must not hold on to any of its tensors: it lives until the backward.
    def carry(x_TD: Tensor, gates: Tensor, token_n: Tensor) -> tuple[Tensor, ...]:
        # The second time is the backward's.
        counting = next(tallies, tally._replace(repeated=True))
        x_mD, gates_m = exchange(Rows(x_TD, gates, token_n, send, recv).parcels(), group, counting)
        gates_G = gates_m.split([len(bank.A_LRD) for bank in banks], dim=1)
        # How many tokens of a round each expert has is not known without a wait: the fused formulation needs no counts.
        sums = [apply_experts(x_mD, gates_mL, bank, None) for gates_mL, bank in zip(gates_G, banks, strict=True)]
        return tuple(exchange([Parcel("sums", s, recv, send) for s in sums], group, counting))

    return checkpoint(carry, part.x_TD, part.gates, part.token_N, use_reentrant=False, preserve_rng_state=False)
