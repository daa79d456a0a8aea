"""The ranks of a run as plain torch.distributed sees them: who this process is, and errors that reach all ranks.

A process group need not exist: everything here also works in a single process.
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
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def peak_memory(self) -> int:
        """The most bytes in use at once since the start: of the device, on a CPU of the whole process."""
        if self.device.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(torch.get_device_module(self.device).max_memory_allocated(self.device))


def from_main(value: T) -> T:
    """The value that rank 0 has, on every rank; every rank calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def raise_on_all_ranks(activity: str) -> Iterator[None]:
    """Raise an error on every rank if the body fails on any rank, so that no rank waits in the next collective forever.

    Every rank must enter. The body must not contain collectives: a rank that fails would leave the others waiting in them.

    Args:
        activity: what the body does, for the message on the other ranks, as in "reading the data".

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
