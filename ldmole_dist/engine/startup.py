"""Join the process group of a run."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from ldmole_dist.distributed import Process, free_port

# DeepSpeed detects the accelerator when it is imported. Without one it logs several warnings, unless this variable is set.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator

# Environment variables with the rank of a process on its host, in order: torchrun and DeepSpeed, Open MPI, Intel MPI and MPICH,
# MVAPICH.
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK")


def start(timeout_minutes: float = 30.0) -> Process:
    """Join the process group that the launcher describes in the environment; without a launcher, create one with a single rank.

    Args:
        timeout_minutes: minutes after which a collective that some rank has not entered raises an error.

    Returns:
        Rank, world size and device of this process.
    """
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates, with a warning at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # PEFT 0.21 reads an attribute that transformers 5.23 deprecates, with a warning at each injection.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing` is deprecated")
    if "RANK" not in os.environ and not _inside_mpirun():
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        # Otherwise DeepSpeed compiles its shared-memory collectives, which takes most of a minute and needs a compiler; this
        # package does not use them.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            # By default each rank would use all cores of the host, and ranks that share the cores would run many times slower.
            # The number of ranks on this host is in a variable of torchrun, DeepSpeed or Open MPI. Without one, assume that all
            # WORLD_SIZE ranks are on this host or, if WORLD_SIZE is not set either, only this one.
            names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE")
            local_ranks = next((int(os.environ[name]) for name in names if name in os.environ), 1)
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    local_rank = next((int(os.environ[name]) for name in LOCAL_RANK_VARIABLES if name in os.environ), 0)
    if not on_cpu:
        # Slurm can restrict each rank to one visible device, numbered 0 in that rank. `_set_local_rank` stores the index of the
        # device in the environment, where DeepSpeed reads the index.
        local_rank %= accelerator.device_count()
        _set_local_rank(local_rank)
        accelerator.set_device(local_rank)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
            timeout=timedelta(minutes=timeout_minutes),
            verbose=False,
        )
    if not on_cpu:
        _set_local_rank(local_rank)  # inside mpirun, init_distributed has set LOCAL_RANK to the rank on this host
    device = torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))
    return Process(dist.get_rank(), dist.get_world_size(), device)


def _set_local_rank(local_rank: int) -> None:
    for name in LOCAL_RANK_VARIABLES:
        if name in os.environ:
            os.environ[name] = str(local_rank)


def _inside_mpirun() -> bool:
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
