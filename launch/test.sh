#!/usr/bin/env bash
# Run the linter, the type checker and the tests.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

full=false
pytest_args=()
for arg in "$@"; do
    case "$arg" in
        --full)
            full=true
            ;;
        -h | --help)
            echo "usage: launch/test.sh [--full] [pytest arguments...]"
            echo "  --full   after the quick tests, also run the long distributed, fault and host tests"
            echo "Further arguments go to pytest; -n 0 runs the tests in one process, which -s and --pdb need."
            echo "The longest sweeps are in launch/nightly.sh."
            exit
            ;;
        *)
            pytest_args+=("$arg")
            ;;
    esac
done

setup_env dev
export TOKENIZERS_PARALLELISM=false
# Workers and ranks share the cores: with more than one thread each, they spend half of their time waiting for one another.
export OMP_NUM_THREADS=1
if [[ "$(gpu_count)" == 0 ]]; then
    export DS_ACCELERATOR=cpu
fi

if "$full"; then
    # The name of the folder contains the versions, so that other versions are installed to another folder.
    quantization=(torchao==0.18.0 hqq==0.2.8.post1 einops==0.8.2 termcolor==3.3.0)
    export LDMOLE_QUANTIZATION_PACKAGES="$venv/quantization/$(IFS=_; echo "${quantization[*]}")"
    if [[ ! -d "$LDMOLE_QUANTIZATION_PACKAGES" ]]; then
        echo "test: installing ${quantization[*]}"
        rm -rf -- "$venv/quantization"
        "$python" -m pip install --no-deps --target "$venv/quantization/new" "${quantization[@]}"
        mv -- "$venv/quantization/new" "$LDMOLE_QUANTIZATION_PACKAGES"
    fi
fi

cd -- "$root"
times=()
begun=$SECONDS
echo "test: ruff"
"$python" -m ruff check
echo "test: mypy"
"$python" -m mypy
times+=("ruff and mypy $((SECONDS - begun)) s")

status=5
# run_tier NAME WORKERS MARKERS: run the tests with these markers; all tests of a file run in the same worker.
run_tier() {
    local begun=$SECONDS code=0
    echo "test: pytest -m '$3'"
    # Keep the order of collection: the order of xdist puts files with few tests last, and these run longest.
    "$python" -m pytest --durations=10 -n "$2" --dist loadfile --no-loadscope-reorder -m "$3" "${pytest_args[@]}" ||
        code=$?
    times+=("$1 tests $((SECONDS - begun)) s")
    # pytest exits with 5 if it ran no test; the arguments may select tests of one tier only.
    if ((code == 0)); then
        status=0
    elif ((code != 5)); then
        echo "test: failed; $(IFS=,; echo "${times[*]}")"
        exit "$code"
    fi
}

run_tier quick 2 "not full and not nightly"
if "$full"; then
    # Without workers, because these tests limit the time from a fault until all ranks have ended.
    run_tier cluster 0 "full and alone"
    run_tier full 2 "full and not alone and not nightly"
fi
echo "test: $(IFS=,; echo "${times[*]}")"
exit "$status"
