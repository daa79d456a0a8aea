"""The command-line arguments of `ldmole launch` and `ldmole doctor`."""

from __future__ import annotations

import argparse
import os

from ldmole_dist.cli_arguments import positive
from ldmole_dist.cluster.runners import LAUNCHERS

DEFAULT_PORT = 29500  # torchrun's default
LAUNCH_DESCRIPTION = """Start a training run with one process per rank, on this host or on many hosts, and print the launcher
command that is used. If a rank fails or stalls, all ranks on all hosts are killed, and the end of the output names the first
failure."""


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ldmole launch`, including those of `add_arguments`."""
    parser.add_argument("--dry-run", action="store_true", help="print the launcher command without running it")
    parser.add_argument(
        "--max-restarts",
        type=positive,
        default=0,
        metavar="N",
        help="maximum number of restarts from the last checkpoint after a failure (default: %(default)s)",
    )
    parser.add_argument(
        "--stall-minutes",
        type=float,
        default=10.0,
        metavar="M",
        help="minutes without a heartbeat from a rank after which the run is treated as failed (default: %(default)s)",
    )
    parser.add_argument("--no-doctor", action="store_true", help="with several hosts: skip the checks before the start")
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `launch` and `doctor` share: hosts, ranks, launcher and network."""
    where = parser.add_argument_group("hosts and ranks")
    where.add_argument("--hostfile", help="file with a line 'NAME slots=N' per host; see launch/hostfile.example")
    where.add_argument(
        "--include", default="", metavar="NAME[:SLOT,...]@...", help="hosts and slots to use (default: all)"
    )
    where.add_argument(
        "--exclude", default="", metavar="NAME[:SLOT,...]@...", help="hosts and slots to leave out (default: none)"
    )
    where.add_argument(
        "--nodes",
        type=positive,
        help="number of hosts; starts the job without ssh: run the command on each host, with its own --node-rank",
    )
    where.add_argument("--node-rank", type=int, help="with --nodes: index of this host, from 0")
    where.add_argument("--master-addr", help="with --nodes: address of host 0")
    where.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        help="with --nodes: TCP port on host 0; the port PORT + 1 is used as well (default: %(default)s)",
    )
    where.add_argument(
        "--ranks",
        type=positive,
        help="number of ranks on this host, without a hostfile (default: one per GPU; without GPUs, parallelism.ep_size)",
    )
    how = parser.add_argument_group("launcher and network")
    how.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        help="launcher to use (default: torchrun with --nodes; with --hostfile, pdsh if it is installed, otherwise openmpi; "
        "slurm inside an allocation; otherwise local)",
    )
    how.add_argument(
        "--interface", help="network interface between hosts (default: the one on the route to the other hosts)"
    )
    how.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="environment variable to pass to the ranks, in addition to those of docs/clusters.md; can be repeated",
    )
    how.add_argument(
        "--ssh-args",
        default=os.environ.get("PDSH_SSH_ARGS_APPEND", ""),
        help="additional arguments for ssh, such as '-F my_ssh_config' (default: $PDSH_SSH_ARGS_APPEND)",
    )
    how.add_argument("--launcher-args", default="", help="additional arguments for pdsh, mpirun, srun or torchrun")
