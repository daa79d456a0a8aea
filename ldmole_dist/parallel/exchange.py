"""Variable-split all-to-all of several tensors at once, as an autograd function that counts what goes to other ranks.

Every rank of the group makes the same calls in the same order, with whatever sizes its data gives, 0 included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Parcel(NamedTuple):
    """Rows for every rank of a group: the first `send[0]` go to rank 0, and so on; `recv[q]` rows come from rank q."""

    kind: str
    rows: Tensor
    send: list[int]
    recv: list[int]


class Wire(Counter[str]):
    """Elements sent to other ranks by kind; gradients are counted as "grad_" + kind."""


def exchange(parcels: Sequence[Parcel], group: dist.ProcessGroup, wire: Wire) -> list[Tensor]:
    """One all-to-all for all parcels; the backward is one all-to-all of their gradients.

    Args:
        parcels: each (sum(send), width), any dtype; the same kinds on every rank.
        group: the ranks that exchange.
        wire: where the elements are counted.

    Returns:
        For each parcel the rows that came, (sum(recv), width), in order of their source.
    """
    header = [(p.kind, p.send, p.recv) for p in parcels]
    return list(_Exchange.apply(header, group, wire, *(p.rows for p in parcels)))


def exchange_counts(counts_PC: Tensor, group: dist.ProcessGroup, wire: Wire) -> Tensor:
    """Row q goes to rank q; row q of the result came from rank q. Integers, no gradient.

    Args:
        counts_PC: (P, C) integers.
        group: the P ranks that exchange.
        wire: where the elements are counted, as "counts".
    """
    received = torch.empty_like(counts_PC)
    dist.all_to_all_single(received, counts_PC.contiguous(), group=group)
    wire["counts"] += counts_PC.numel() - counts_PC.shape[1]
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, header: Any, group: dist.ProcessGroup, wire: Wire, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back = [(f"grad_{kind}", recv, send) for kind, send, recv in header], group, wire
        return tuple(
            _move([Parcel(kind, t, *ways) for (kind, *ways), t in zip(header, tensors, strict=True)], group, wire)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        header, group, wire = ctx.back
        # Which inputs need a gradient follows from the model, not from the data: it is the same on every rank.
        needed = [i for i in range(len(header)) if ctx.needs_input_grad[3 + i]]
        moved = _move([Parcel(header[i][0], grads[i], *header[i][1:]) for i in needed], group, wire)
        results: list[Tensor | None] = [None] * len(header)
        for i, gradient in zip(needed, moved, strict=True):
            results[i] = gradient
        return None, None, None, *results


def _move(parcels: list[Parcel], group: dist.ProcessGroup, wire: Wire) -> list[Tensor]:
    own = dist.get_rank(group)
    for kind, rows, send, _ in parcels:
        wire[kind] += (sum(send) - send[own]) * rows.shape[1]
    if len(parcels) == 1:
        ((_, rows, send, recv),) = parcels
        received = rows.new_empty(sum(recv), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), recv, send, group=group)
        return [received]
    # Several tensors, of several dtypes, in one message to each rank: as bytes, rank by rank, parcel by parcel.
    as_bytes = [p.rows.contiguous().view(torch.uint8) for p in parcels]
    outgoing = [b.split(p.send) for b, p in zip(as_bytes, parcels, strict=True)]
    ranks = range(len(parcels[0].send))
    packed = torch.cat([chunks[rank].flatten() for rank in ranks for chunks in outgoing])
    sizes = [[p.recv[rank] * b.shape[1] for b, p in zip(as_bytes, parcels, strict=True)] for rank in ranks]
    arrived = packed.new_empty(sum(map(sum, sizes)))
    sent = [sum(chunks[rank].numel() for chunks in outgoing) for rank in ranks]
    dist.all_to_all_single(arrived, packed, [sum(s) for s in sizes], sent, group=group)
    pieces = iter(arrived.split([size for of_rank in sizes for size in of_rank]))
    by_rank = [[next(pieces) for _ in parcels] for _ in ranks]
    return [
        torch.cat([of_rank[i] for of_rank in by_rank]).view(p.rows.dtype).view(-1, p.rows.shape[1])
        for i, p in enumerate(parcels)
    ]
