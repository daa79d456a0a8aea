"""Detection of this process's rank and world size from the environment of any launcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# World size as set by Open MPI, by MPI libraries with PMI (MPICH, Intel MPI), and by MVAPICH.
_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class RankEnvironment:
    """Rank and world size of a process."""

    rank: int
    world_size: int


def inside_mpi(environ: Mapping[str, str]) -> bool:
    """Return whether an MPI launcher started this process as one of several."""
    return any(int(environ.get(name, 1)) > 1 for name in _MPI_SIZE_VARIABLES)


def inside_slurm_step(environ: Mapping[str, str]) -> bool:
    """Return whether srun started this process as one of several; False in the batch script itself."""
    return "SLURM_PROCID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def detect_rank_environment(environ: Mapping[str, str]) -> RankEnvironment:
    """Return rank and world size as set by torchrun or DeepSpeed (RANK), MPI or Slurm; without a launcher, rank 0 of 1."""
    if "RANK" in environ:
        return RankEnvironment(int(environ["RANK"]), int(environ["WORLD_SIZE"]))
    # MPI before Slurm: in an allocation, mpirun starts its daemons with srun, and its processes inherit the variables of srun.
    if inside_mpi(environ):
        from mpi4py import MPI  # the import calls MPI_Init

        return RankEnvironment(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size())
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return RankEnvironment(int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"]))
    return RankEnvironment(0, 1)
