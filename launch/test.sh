#!/usr/bin/env bash
# Runs the linter, the type checker and the tests.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

tiers=("not full")
pytest_args=()
for arg in "$@"; do
    case "$arg" in
        --full)
            tiers+=("full")
            ;;
        -h | --help)
            echo "usage: launch/test.sh [--full] [pytest arguments...]"
            echo "  --full   after the quick tests, also run the long distributed, fault and host tests"
            exit
            ;;
        *)
            pytest_args+=("$arg")
            ;;
    esac
done

setup_env dev
export TOKENIZERS_PARALLELISM=false
if [[ "$(gpu_count)" == 0 ]]; then
    export DS_ACCELERATOR=cpu
fi

cd -- "$root"
echo "test: ruff"
"$python" -m ruff check
echo "test: mypy"
"$python" -m mypy

status=5
for tier in "${tiers[@]}"; do
    echo "test: pytest -m '$tier'"
    code=0
    "$python" -m pytest --durations=10 -m "$tier" "${pytest_args[@]}" || code=$?
    # pytest exits with 5 where it ran no test: the arguments may choose tests of one tier only.
    if ((code == 0)); then
        status=0
    elif ((code != 5)); then
        exit "$code"
    fi
done
exit "$status"
