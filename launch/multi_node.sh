#!/usr/bin/env bash
# Train on the hosts of a hostfile over ssh, with DeepSpeed's pdsh runner. The repository must have the same path on all
# hosts.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

if (($# < 2)) || [[ "$1" == -h || "$1" == --help ]]; then
    echo "usage: launch/multi_node.sh HOSTFILE CONFIG.yaml [--max-restarts N] [--interface NAME] [--dry-run] [a.b=c ...]"
    exit
fi
hostfile="$1"
shift
use_env
exec "$python" -m ldmole_dist.cli launch --hostfile "$hostfile" --launcher pdsh "$@"
