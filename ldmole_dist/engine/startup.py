"""Bringing the processes of a run together, and making an error of one rank an error of all."""

from __future__ import annotations

import os
import resource
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

# DeepSpeed looks for a device when it is imported and says at length that there is none; say so first.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator

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
        return int(get_accelerator().max_memory_allocated())


def start(timeout_minutes: float = 30.0) -> Process:
    """Join the process group that the launcher describes in the environment; without a launcher, be alone.

    Args:
        timeout_minutes: after which a collective that a rank does not enter becomes an error.
    """
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 renamed; a user can do nothing about it, at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Nor about PEFT 0.21 asking transformers 5.23 for an attribute by its old name, at every injection.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing` is deprecated")
    if "RANK" not in os.environ and not _inside_mpirun():
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        # DeepSpeed would compile a shared-memory operator here (most of a minute, and it needs a compiler); nothing of
        # ours uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks that each take every core of their machine slow each other down many times over.
            # The number of ranks on this machine, as torchrun, DeepSpeed and Open MPI say it.
            names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE")
            neighbours = next((int(os.environ[name]) for name in names if name in os.environ), 1)
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // neighbours))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if not on_cpu:
        # Slurm can let each rank see its own device only; DeepSpeed takes the device's number from these variables.
        local_rank %= accelerator.device_count()
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
            if name in os.environ:
                os.environ[name] = str(local_rank)
        accelerator.set_device(local_rank)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
            timeout=timedelta(minutes=timeout_minutes),
            verbose=False,
        )
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))
    return Process(dist.get_rank(), dist.get_world_size(), device)


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


def _inside_mpirun() -> bool:
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))


@contextmanager
def agreed(doing: str) -> Iterator[None]:
    """Every rank enters; where one fails, all fail: no rank is left behind waiting in a collective.

    The block itself must not contain collectives that a failing rank would miss.

    Args:
        doing: for the message on the other ranks, as in "reading the data".

    Raises:
        The error itself on the first rank that failed; PeerError, naming that rank and its error, on all others.
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
            raise PeerError(f"rank {first} failed while {doing}: {errors[first]}") from own
    if own is not None:
        raise own
