"""Which rank this process is, whoever started it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# What MPI libraries set in the processes that they start: Open MPI, those with PMI (MPICH, Intel MPI), MVAPICH.
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """A rank among those of its job."""

    rank: int
    size: int


def inside_mpi(environ: Mapping[str, str]) -> bool:
    """Whether an MPI launcher started this process as one of several."""
    return any(int(environ.get(name, 1)) > 1 for name in _MPI)


def inside_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several; in a batch script there is no step yet."""
    return "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def find_place(environ: Mapping[str, str]) -> Place:
    """This process's place, from torchrun or DeepSpeed (RANK), MPI (asked through mpi4py) or Slurm; alone otherwise."""
    if "RANK" in environ:
        return Place(int(environ["RANK"]), int(environ["WORLD_SIZE"]))
    # Before Slurm: mpirun starts its daemons with srun, whose variables its processes inherit.
    if inside_mpi(environ):
        from mpi4py import MPI  # initialises it

        return Place(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size())
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return Place(int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"]))
    return Place(0, 1)
