#!/usr/bin/env bash
# Train on this host, with one rank per GPU; without GPUs, with parallelism.ep_size ranks.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

if (($# == 0)) || [[ "$1" == -h || "$1" == --help ]]; then
    echo "usage: launch/single_node.sh CONFIG.yaml [--ranks N] [--max-restarts N] [--dry-run] [a.b=c ...]"
    exit
fi
use_env
exec "$python" -m ldmole_dist.cli launch "$@"
