"""Differentiable all-to-all of several tensors with variable split sizes, in flight while other work runs.

`start_exchange` starts the all-to-all and `PendingExchange.wait` waits for it. Operations between the two calls overlap with
the all-to-all. Their backward overlaps with the all-to-all of the gradients, because autograd runs the ready node that the
forward created last. Only the overlap depends on this order. A dependency in the graph ensures that gradients are sent before
they are received.

Every rank of the group must make the same calls in the same order. The number of rows may differ and may be 0.
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


class Payload(NamedTuple):
    """Rows of one tensor for every rank of a group, in order of destination.

    Args:
        kind: kind under which the elements are counted (`wire.KINDS`).
        rows: (sum(send), width), ordered by destination rank.
        send: number of rows for each rank; the first `send[0]` rows go to rank 0.
        recv: number of rows from each rank.
    """

    kind: str
    rows: Tensor
    send: list[int]
    recv: list[int]


class PendingExchange(NamedTuple):
    """An all-to-all in flight, started by `start_exchange`."""

    state: _ExchangeState
    token: Tensor

    def wait(self) -> list[Tensor]:
        """Return the received rows of each payload, (sum(recv), width), ordered by source rank. Call it exactly once."""
        return list(_Receive.apply(self.state, self.token))


def start_exchange(
    payloads: Sequence[Payload], group: dist.ProcessGroup, tally: Tally, overlap: bool = True
) -> PendingExchange:
    """Start one all-to-all of all payloads; the backward is one all-to-all of their gradients. Both are collective.

    Args:
        payloads: payloads to send, in any dtype; their kinds and order must be the same on every rank.
        group: process group of the ranks that exchange.
        tally: counter of the elements sent; gradients are counted as "grad_" + kind.
        overlap: False waits for each all-to-all as soon as it is started, forward and backward.

    Returns:
        The all-to-all in flight; its `wait` returns the received rows.
    """
    state = _ExchangeState([(p.kind, p.send, p.recv) for p in payloads], group, tally, overlap)
    return PendingExchange(state, _Send.apply(state, *(p.rows for p in payloads)))


def exchange(payloads: Sequence[Payload], group: dist.ProcessGroup, tally: Tally) -> list[Tensor]:
    """Exchange all payloads without overlap; see `start_exchange` and `PendingExchange.wait`."""
    return start_exchange(payloads, group, tally, overlap=False).wait()


def exchange_counts(counts_PC: Tensor, group: dist.ProcessGroup, tally: Tally) -> Tensor:
    """Send row q of `counts_PC` to rank q, and receive one row from each rank. Collective; not differentiable.

    Args:
        counts_PC: (P, C) integers.
        group: process group of the P ranks that exchange.
        tally: counter of the elements sent, as "counts".

    Returns:
        (P, C) integers; row q was sent by rank q.
    """
    received = torch.empty_like(counts_PC)
    dist.all_to_all_single(received, counts_PC.contiguous(), group=group)
    tally.add("counts", counts_PC.numel() - counts_PC.shape[1], counts_PC)  # a rank's own row stays on the rank
    return received


@dataclass
class _ExchangeState:
    """State that the forward and the backward of one exchange share."""

    header: list[tuple[str, list[int], list[int]]]  # kind, send, recv of each payload
    group: dist.ProcessGroup
    tally: Tally
    overlap: bool
    # Indices of the payloads that need a gradient. They depend on the model, not on the data, so they are the same on every
    # rank, and so are the kinds sent in the backward.
    needed: list[int] = field(default_factory=list)
    in_flight: _AllToAll | None = None

    def take(self) -> list[Tensor]:
        """Wait for the all-to-all in flight, whose buffers can then be freed, and return the received rows of each payload."""
        assert self.in_flight is not None, "an exchange can be waited for only once"
        in_flight, self.in_flight = self.in_flight, None
        return in_flight.wait()


class _Send(torch.autograd.Function):
    """Start the exchange and return a tensor without elements, which ties `_Receive` to this node in the graph."""

    @staticmethod
    def forward(ctx: Any, state: _ExchangeState, *tensors: Tensor) -> Tensor:
        ctx.state = state
        state.needed = [i for i in range(len(tensors)) if ctx.needs_input_grad[1 + i]]
        payloads = [Payload(kind, t, send, recv) for (kind, send, recv), t in zip(state.header, tensors, strict=True)]
        state.in_flight = _AllToAll(payloads, state.group, state.tally, state.overlap)
        return tensors[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        state = ctx.state
        gradients: list[Tensor | None] = [None] * len(state.header)
        for i, gradient in zip(state.needed, state.take(), strict=True):
            gradients[i] = gradient
        return None, *gradients


class _Receive(torch.autograd.Function):
    """Return the received rows; the backward starts the all-to-all of their gradients."""

    @staticmethod
    def forward(ctx: Any, state: _ExchangeState, token: Tensor) -> tuple[Tensor, ...]:
        ctx.state, ctx.device = state, token.device
        received = state.take()
        ctx.mark_non_differentiable(*(r for i, r in enumerate(received) if i not in state.needed))
        return tuple(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        state = ctx.state
        payloads = []
        for i in state.needed:
            kind, send, recv = state.header[i]
            payloads.append(Payload(f"grad_{kind}", grads[i], recv, send))  # from receiver to sender
        state.in_flight = _AllToAll(payloads, state.group, state.tally._replace(repeated=False), state.overlap)
        return None, torch.empty(0, device=ctx.device)


class _AllToAll:
    """One all-to-all in flight that carries all payloads; `wait` splits the received data into them."""

    def __init__(self, payloads: Sequence[Payload], group: dist.ProcessGroup, tally: Tally, overlap: bool) -> None:
        own = dist.get_rank(group)
        for kind, rows, send, _ in payloads:
            tally.add(kind, (sum(send) - send[own]) * rows.shape[1], rows)
        self._layout = [(p.rows.dtype, p.rows.shape[1], p.recv) for p in payloads]
        self._clock = tally.wire.clock
        with self._clock.measure("exchanging", payloads[0].rows.device):
            # Keep the packed tensor until the wait: with async_op, the collective still reads it.
            self._packed, sent, received = _pack(payloads)
            self._received = self._packed.new_empty(sum(received), *self._packed.shape[1:])
            self._work = dist.all_to_all_single(
                self._received, self._packed, received, sent, group=group, async_op=overlap
            )

    def wait(self) -> list[Tensor]:
        """Wait for the all-to-all and return the received rows of each payload."""
        with self._clock.measure("exchanging", self._received.device):
            if self._work is not None:
                self._work.wait()
            return self._unpack()

    def _unpack(self) -> list[Tensor]:
        if len(self._layout) == 1:
            return [self._received]
        ranks = range(len(self._layout[0][2]))
        widths = [width * dtype.itemsize for dtype, width, _ in self._layout]
        sizes = [recv[rank] * width for rank in ranks for (_, _, recv), width in zip(self._layout, widths, strict=True)]
        chunks = self._received.split(sizes)
        return [
            torch.cat(chunks[i :: len(self._layout)]).view(dtype).view(-1, width)
            for i, (dtype, width, _) in enumerate(self._layout)
        ]


def _pack(payloads: Sequence[Payload]) -> tuple[Tensor, list[int], list[int]]:
    """Return one tensor with all payloads in order of destination, and its split sizes for sending and receiving.

    A single payload is returned as rows, with split sizes in rows; several payloads as flat bytes, with split sizes in bytes.
    """
    if len(payloads) == 1:
        ((_, rows, send, recv),) = payloads
        return rows.contiguous(), send, recv
    # Pack payloads of different dtypes and widths as bytes: one all-to-all instead of one for each payload.
    as_bytes = [p.rows.contiguous().view(torch.uint8) for p in payloads]
    chunks = [b.split(p.send) for b, p in zip(as_bytes, payloads, strict=True)]
    ranks = range(len(payloads[0].send))
    packed = torch.cat([of_payload[rank].flatten() for rank in ranks for of_payload in chunks])
    sent = [sum(of_payload[rank].numel() for of_payload in chunks) for rank in ranks]
    received = [sum(p.recv[rank] * b.shape[1] for b, p in zip(as_bytes, payloads, strict=True)) for rank in ranks]
    return packed, sent, received
