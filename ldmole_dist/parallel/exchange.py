"""Variable-split all-to-all as an autograd function, counting what really goes to other ranks.

Every rank of the group calls each function the same number of times, with whatever sizes its data gives, 0 included.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def all_to_all(
    x: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, wire: Counter[str], kind: str
) -> Tensor:
    """Rows to their ranks; the backward brings the gradient rows back the same way.

    Args:
        x: (sum(send), ...) rows in order of their destination.
        send: rows for each rank of the group.
        recv: rows from each rank of the group.
        group: the ranks that exchange.
        wire: counter of elements sent to other ranks, by kind.
        kind: under which x is counted; its gradient is counted under "grad_" + kind.

    Returns:
        (sum(recv), ...) rows in order of their source.
    """
    return _AllToAll.apply(x, send, recv, group, wire, kind)


def exchange_counts(counts_PC: Tensor, group: dist.ProcessGroup, wire: Counter[str]) -> Tensor:
    """Row q goes to rank q; row q of the result came from rank q. Integers, no gradient.

    Args:
        counts_PC: (P, C) integers.
        group: the P ranks that exchange.
        wire: counter of elements sent to other ranks, by kind.
    """
    received = torch.empty_like(counts_PC)
    dist.all_to_all_single(received, counts_PC.contiguous(), group=group)
    wire["counts"] += counts_PC.numel() - counts_PC.shape[1]
    return received


def _exchange(
    x: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, wire: Counter[str], kind: str
) -> Tensor:
    received = x.new_empty(sum(recv), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), recv, send, group=group)
    wire[kind] += (sum(send) - send[dist.get_rank(group)]) * x[:1].numel() if sum(send) else 0
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup, wire: Counter[str], kind: str
    ) -> Tensor:
        ctx.back = recv, send, group, wire, f"grad_{kind}"
        return _exchange(x, send, recv, group, wire, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, *ctx.back), None, None, None, None, None
