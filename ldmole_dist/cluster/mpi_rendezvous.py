"""Meeting the other ranks through MPI, where mpirun has started `ldmole launch` itself, once for each rank."""

from __future__ import annotations

import secrets
import socket
import threading

from ldmole_dist.cluster.coordinator import Watch
from ldmole_dist.cluster.network import address_towards, interfaces
from ldmole_dist.cluster.output import say
from ldmole_dist.cluster.rank_environment import Place


def meet(
    place: Place, interface: str | None, stall_seconds: float
) -> tuple[tuple[str, int], str, threading.Thread | None]:
    """Agree on a watch, which rank 0 serves beside its supervisor.

    Returns:
        The watch's address, the job's name, and on rank 0 the thread that ends when the job has, and prints what failed.
    """
    from mpi4py import MPI

    names = MPI.COMM_WORLD.allgather(socket.gethostname())
    found: tuple[tuple[str, int], str] | None = None
    thread: threading.Thread | None = None
    if place.rank == 0:
        others = [name for name in names if name != names[0]]
        watch = Watch(_own_address(others, interface), secrets.token_hex(8), place.size, stall_seconds, say, early=True)
        thread = threading.Thread(target=_serve, args=[watch])
        thread.start()
        found = watch.address, watch.job
    at, job = MPI.COMM_WORLD.bcast(found)
    return at, job, thread


def _own_address(others: list[str], interface: str | None) -> str:
    known = interfaces()
    if interface in known:
        return known[interface]
    if not others:
        return "127.0.0.1"
    try:
        return address_towards(others[0])
    except OSError:  # hosts, in containers for example, that do not know each other's names
        return next((address for address in known.values() if not address.startswith("127.")), "127.0.0.1")


def _serve(watch: Watch) -> None:
    try:
        watch.serve(lambda: None)
    finally:
        watch.close()
