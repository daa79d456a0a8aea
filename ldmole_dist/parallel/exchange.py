"""Variable-split all-to-all of several tensors at once, under way while something else is computed, differentiable.

`send` starts it and `Sent.arrived` waits. What a forward computes between the two, its backward computes between the
sending of the gradients and their arrival: of the nodes that are ready, autograd's engine takes the one made last. (Only what
overlaps depends on that. That gradients arrive after they were sent does not.)

Every rank of the group makes the same calls in the same order, with whatever sizes its data gives, 0 included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldmole_dist.parallel.wire import Tally


class Parcel(NamedTuple):
    """Rows for every rank of a group: the first `send[0]` go to rank 0, and so on; `recv[q]` rows come from rank q."""

    kind: str
    rows: Tensor
    send: list[int]
    recv: list[int]


class Sent(NamedTuple):
    """Parcels under way."""

    trip: _Trip
    token: Tensor

    def arrived(self) -> list[Tensor]:
        """Wait for the rows of each parcel, (sum(recv), width), in order of their source; to be called once."""
        return list(_Arrive.apply(self.trip, self.token))


def send(parcels: Sequence[Parcel], group: dist.ProcessGroup, tally: Tally, overlap: bool = True) -> Sent:
    """Start one all-to-all for all parcels; the backward is one all-to-all of their gradients.

    Args:
        parcels: each (sum(send), width), any dtype; the same kinds on every rank.
        group: the ranks that exchange.
        tally: where the elements are counted; gradients as "grad_" + kind.
        overlap: if not, wait right here, and in the backward right where the gradients are sent.
    """
    trip = _Trip([(p.kind, p.send, p.recv) for p in parcels], group, tally, overlap)
    return Sent(trip, _Send.apply(trip, *(p.rows for p in parcels)))


def exchange(parcels: Sequence[Parcel], group: dist.ProcessGroup, tally: Tally) -> list[Tensor]:
    """`send` and wait."""
    return send(parcels, group, tally, overlap=False).arrived()


def exchange_counts(counts_PC: Tensor, group: dist.ProcessGroup, tally: Tally) -> Tensor:
    """Row q goes to rank q; row q of the result came from rank q. Integers, no gradient.

    Args:
        counts_PC: (P, C) integers.
        group: the P ranks that exchange.
        tally: where the elements are counted, as "counts".
    """
    received = torch.empty_like(counts_PC)
    dist.all_to_all_single(received, counts_PC.contiguous(), group=group)
    tally.add("counts", counts_PC.numel() - counts_PC.shape[1], counts_PC)
    return received


@dataclass
class _Trip:
    """What the forward and the backward of one exchange share."""

    header: list[tuple[str, list[int], list[int]]]  # kind, send, recv
    group: dist.ProcessGroup
    tally: Tally
    overlap: bool
    # The parcels that need a gradient: it follows from the model, not from the data, and is the same on every rank.
    needed: list[int] = field(default_factory=list)
    under_way: _UnderWay | None = None

    def take(self) -> list[Tensor]:
        """Wait for what was last started, and let go of it."""
        assert self.under_way is not None, "parcels arrive once"
        under_way, self.under_way = self.under_way, None
        return under_way.wait()


class _Send(torch.autograd.Function):
    """Parcels -> a token that stands for them, without elements."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, *tensors: Tensor) -> Tensor:
        ctx.trip = trip
        trip.needed = [i for i in range(len(tensors)) if ctx.needs_input_grad[1 + i]]
        parcels = [Parcel(kind, t, *ways) for (kind, *ways), t in zip(trip.header, tensors, strict=True)]
        trip.under_way = _UnderWay(parcels, trip.group, trip.tally, trip.overlap)
        return tensors[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        trip = ctx.trip
        gradients: list[Tensor | None] = [None] * len(trip.header)
        for i, gradient in zip(trip.needed, trip.take(), strict=True):
            gradients[i] = gradient
        return None, *gradients


class _Arrive(torch.autograd.Function):
    """The token -> what came."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, token: Tensor) -> tuple[Tensor, ...]:
        ctx.trip, ctx.device = trip, token.device
        received = trip.take()
        ctx.mark_non_differentiable(*(r for i, r in enumerate(received) if i not in trip.needed))
        return tuple(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        trip = ctx.trip
        parcels = []
        for i in trip.needed:
            kind, to, source = trip.header[i]
            parcels.append(Parcel(f"grad_{kind}", grads[i], source, to))
        trip.under_way = _UnderWay(parcels, trip.group, trip.tally._replace(repeated=False), trip.overlap)
        return None, torch.empty(0, device=ctx.device)


class _UnderWay:
    """An all-to-all that has begun, and how to unpack what it brings."""

    def __init__(self, parcels: Sequence[Parcel], group: dist.ProcessGroup, tally: Tally, overlap: bool) -> None:
        own = dist.get_rank(group)
        for kind, rows, to, _ in parcels:
            tally.add(kind, (sum(to) - to[own]) * rows.shape[1], rows)
        self._parcels = [(p.rows.dtype, p.rows.shape[1], p.recv) for p in parcels]
        self._clock = tally.wire.clock
        with self._clock.measured("exchanging", parcels[0].rows.device):
            self._packed, sent, received = _packed(parcels)
            self._arrived = self._packed.new_empty(sum(received), *self._packed.shape[1:])
            self._work = dist.all_to_all_single(
                self._arrived, self._packed, received, sent, group=group, async_op=overlap
            )

    def wait(self) -> list[Tensor]:
        """What came of each parcel."""
        with self._clock.measured("exchanging", self._arrived.device):
            if self._work is not None:
                self._work.wait()
            return self._unpacked()

    def _unpacked(self) -> list[Tensor]:
        if len(self._parcels) == 1:
            return [self._arrived]
        ranks = range(len(self._parcels[0][2]))
        widths = [width * dtype.itemsize for dtype, width, _ in self._parcels]
        sizes = [
            recv[rank] * width for rank in ranks for (_, _, recv), width in zip(self._parcels, widths, strict=True)
        ]
        pieces = self._arrived.split(sizes)
        return [
            torch.cat(pieces[i :: len(self._parcels)]).view(dtype).view(-1, width)
            for i, (dtype, width, _) in enumerate(self._parcels)
        ]


def _packed(parcels: Sequence[Parcel]) -> tuple[Tensor, list[int], list[int]]:
    """One tensor with everything in order of destination, and how much of it goes to and comes from each rank."""
    if len(parcels) == 1:
        ((_, rows, to, source),) = parcels
        return rows.contiguous(), to, source
    # Several tensors, of several dtypes, in one message to each rank: as bytes, rank by rank, parcel by parcel.
    as_bytes = [p.rows.contiguous().view(torch.uint8) for p in parcels]
    chunks = [b.split(p.send) for b, p in zip(as_bytes, parcels, strict=True)]
    ranks = range(len(parcels[0].send))
    packed = torch.cat([of_parcel[rank].flatten() for rank in ranks for of_parcel in chunks])
    sent = [sum(of_parcel[rank].numel() for of_parcel in chunks) for rank in ranks]
    received = [sum(p.recv[rank] * b.shape[1] for b, p in zip(as_bytes, parcels, strict=True)) for rank in ranks]
    return packed, sent, received
