"""Helpers for torch.distributed: rank and device of this process, broadcasts, and errors that are raised on all ranks.

Everything here also works in a single process without a process group.
"""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from ldmole_dist.errors import PeerError

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """Rank and device of this process.

    Attributes:
        rank: rank in the default process group; 0 in a single process.
        world_size: number of processes of the run.
        device: device that this process computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints the progress and writes the files that only one rank writes."""
        return self.rank == 0

    def peak_memory(self) -> int:
        """Return the peak memory of this process in bytes.

        On a GPU, this is the peak of the memory that torch has allocated since the process started or since the last reset of
        torch's statistics. On a CPU, this is the peak of the resident memory since the process started.
        """
        if self.device.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
        return int(torch.get_device_module(self.device).max_memory_allocated(self.device))


def broadcast_from_main(value: T) -> T:
    """Return rank 0's value on every rank. Collective: every rank must call it. The value must be picklable."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def free_port() -> int:
    """Return a TCP port that is currently free on this host."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def raise_on_all_ranks(activity: str) -> Iterator[None]:
    """Context manager that raises an error on every rank if its body fails on any rank.

    Without this, the other ranks would wait in their next collective until its timeout. Every rank must enter the context. The
    body must not contain collectives, because the other ranks would wait in them for a rank that has failed.

    Args:
        activity: what the body does, such as "reading the data"; the message of `PeerError` contains it.

    Raises:
        The original error on the lowest rank whose body failed; `PeerError`, which names that rank and its error, on all
        other ranks.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if own is None else f"{type(own).__name__}: {own}")
        first = next((rank for rank, text in enumerate(errors) if text is not None), None)
        if first is not None and first != dist.get_rank():
            raise PeerError(f"rank {first} failed while {activity}: {errors[first]}") from own
    if own is not None:
        raise own
