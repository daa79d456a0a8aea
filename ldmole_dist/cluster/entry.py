"""Entry point of a supervisor, which a launcher starts in place of a rank: `python entry.py OPTIONS -- COMMAND`.

It runs as a file, not as a module, so that it also works on hosts where the package is not installed. It does not import torch,
so that it starts fast and leaves the memory of the host to the ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first in sys.path, where exit.py, messages.py and others could shadow other modules.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ldmole_dist.cluster.mpi_rendezvous import rendezvous
from ldmole_dist.cluster.rank_environment import detect_rank_environment, inside_mpi
from ldmole_dist.cluster.supervisor import Supervisor


def main() -> int:
    """Run the supervisor of one rank, and return its exit code."""
    parser = argparse.ArgumentParser(description="Supervise one rank; `ldmole launch` passes all arguments.")
    parser.add_argument(
        "--coordinator",
        required=True,
        metavar="HOST:PORT",
        help="address of the coordinator, or 'mpi' to start it on rank 0",
    )
    parser.add_argument("--job", help="name of the job")
    parser.add_argument(
        "--stall-seconds",
        type=float,
        help="with --coordinator mpi: seconds without a heartbeat after which the job is treated as stalled",
    )
    parser.add_argument("--interface", help="network interface to use")
    parser.add_argument(
        "--export", action="append", default=[], metavar="NAME=VALUE", help="environment variable for the rank"
    )
    parser.add_argument("command", nargs="+", help="command of the rank")
    args = parser.parse_args()
    exports = dict(variable.split("=", 1) for variable in args.export)
    rank_environment, thread = detect_rank_environment(os.environ), None
    if args.coordinator == "mpi":
        address, job, thread = rendezvous(rank_environment, args.interface, args.stall_seconds)
    else:
        host, _, port = args.coordinator.rpartition(":")
        address, job = (host, int(port)), args.job
    exit_code = Supervisor(rank_environment, args.command, exports, job, args.interface).run(address)
    if thread is not None:
        thread.join()
    return exit_code


if __name__ == "__main__":
    exit_code = 1
    try:
        exit_code = main()
    except Exception:
        traceback.print_exc()
    if exit_code != 0 and inside_mpi(os.environ):
        os._exit(exit_code)  # MPI_Finalize, which mpi4py calls at exit, would wait for the other ranks
    sys.exit(exit_code)
