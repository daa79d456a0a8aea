"""Rendezvous through MPI, for `mpirun ... ldmole launch CONFIG`, where mpirun starts `ldmole launch` once per rank."""

from __future__ import annotations

import secrets
import socket
import threading

from ldmole_dist.cluster.coordinator import Coordinator
from ldmole_dist.cluster.network import address_towards, interfaces
from ldmole_dist.cluster.output import print_status
from ldmole_dist.cluster.rank_environment import RankEnvironment


def rendezvous(
    rank_environment: RankEnvironment, interface: str | None, stall_seconds: float
) -> tuple[tuple[str, int], str, threading.Thread | None]:
    """Start the coordinator in a thread of rank 0, and broadcast its address to all ranks.

    Collective: every rank must call it.

    Args:
        rank_environment: rank and world size of this process.
        interface: network interface whose address the supervisors connect to. If `interface` is None, or has no IPv4 address on
            the host of rank 0, the interface on the route to another host is used or, if no route is found, the first one that
            is not a loopback interface; in a job on one host, the loopback interface.
        stall_seconds: seconds without a heartbeat from a rank after which the job is treated as stalled.

    Returns:
        Address and port of the coordinator; name of the job; the coordinator's thread on rank 0, None on other ranks.
    """
    from mpi4py import MPI

    hosts = MPI.COMM_WORLD.allgather(socket.gethostname())
    found: tuple[tuple[str, int], str] | None = None
    thread: threading.Thread | None = None
    if rank_environment.rank == 0:
        address = _local_address([host for host in hosts if host != hosts[0]], interface)
        coordinator = Coordinator(
            address,
            secrets.token_hex(8),
            rank_environment.world_size,
            stall_seconds,
            print_status,
            report_failure=True,
        )
        thread = threading.Thread(target=_serve, args=[coordinator])
        thread.start()
        found = coordinator.address, coordinator.job
    address_and_port, job = MPI.COMM_WORLD.bcast(found)
    return address_and_port, job, thread


def _local_address(other_hosts: list[str], interface: str | None) -> str:
    """Return the IPv4 address of this host at which `other_hosts` reach it (see `rendezvous` for `interface`)."""
    known = interfaces()
    if interface in known:
        return known[interface]
    if not other_hosts:
        return "127.0.0.1"
    try:
        return address_towards(other_hosts[0])
    except OSError:  # the name cannot be resolved, for example between containers, or there is no route
        return next((address for address in known.values() if not address.startswith("127.")), "127.0.0.1")


def _serve(coordinator: Coordinator) -> None:
    try:
        coordinator.serve(lambda: None)
    finally:
        coordinator.close()
