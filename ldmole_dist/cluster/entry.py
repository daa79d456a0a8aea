"""What launchers start in the place of a rank: `python entry.py --watch HOST:PORT --job NAME ... -- COMMAND`.

Run as a file. The package's own start registers the PEFT method, with torch and transformers: that is not for a process that
only waits, so its place is taken by an empty one here.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

package = ModuleType("ldmole_dist")
package.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules["ldmole_dist"] = package
# The files of this folder are no modules of their own.
sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]

from ldmole_dist.cluster.mpi_rendezvous import meet  # noqa: E402
from ldmole_dist.cluster.rank_environment import find_place, inside_mpi  # noqa: E402
from ldmole_dist.cluster.supervisor import Supervisor  # noqa: E402


def main() -> int:
    """Supervise one rank; what is given on the command line is what it needs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watch", required=True, metavar="HOST:PORT", help="or 'mpi', to meet the others through it")
    parser.add_argument("--job")
    parser.add_argument("--stall-seconds", type=float)
    parser.add_argument("--interface")
    parser.add_argument("--export", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    exports = dict(variable.split("=", 1) for variable in args.export)
    place, serving = find_place(os.environ), None
    if args.watch == "mpi":
        watch, job, serving = meet(place, args.interface, args.stall_seconds)
    else:
        host, _, port = args.watch.rpartition(":")
        watch, job = (host, int(port)), args.job
    code = Supervisor(place, args.command, exports, job, args.interface).run(watch)
    if serving is not None:
        serving.join()
    return code


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except Exception:
        traceback.print_exc()
    if code != 0 and inside_mpi(os.environ):
        os._exit(code)  # MPI's own end would wait for the other ranks
    sys.exit(code)
