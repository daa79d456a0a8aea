#!/usr/bin/env bash
# Run the sweeps that take too long for launch/test.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

sections=(readme parity backbones runs qlora benches mutations peft)
usage() {
    echo "usage: launch/nightly.sh [SECTION...]"
    echo "Without a section, all of them run:"
    echo "  readme     every command of README.md and docs/, on the backbone of the quickstart"
    echo "  parity     every combination of ZeRO stage, ep_size, router, mode and checkpointing against one process"
    echo "  backbones  an adapter on tiny random models of every architecture, with LoRA as the reference"
    echo "  runs       checkpoints loaded onto every topology, runs resumed at every stage and precision, a run killed 20 times"
    echo "  qlora      the quickstart with its backbone in 4 bits, compared with the quickstart"
    echo "  benches    every 'ldmole bench' command"
    echo "  peft       PEFT's own tests, downloaded from PyPI, on LD-MoLE"
    echo "  mutations  one bug at a time put into the code; a test must fail for each"
}

chosen=()
for arg in "$@"; do
    case "$arg" in
        readme | parity | backbones | runs | qlora | benches | mutations | peft) chosen+=("$arg") ;;
        -h | --help)
            usage
            exit
            ;;
        *)
            usage >&2
            die "'$arg' is not a section; choose from ${sections[*]}"
            ;;
    esac
done
if ((${#chosen[@]} == 0)); then
    chosen=("${sections[@]}")
fi

setup_env dev
export TOKENIZERS_PARALLELISM=false
if [[ "$(gpu_count)" == 0 ]]; then
    export DS_ACCELERATOR=cpu
fi
cd -- "$root"

run_section() {
    case "$1" in
        readme) "$python" -m pytest -m nightly tests/test_readme.py ;;
        parity) "$python" -m pytest -m nightly tests/selftest ;;
        backbones) "$python" -m pytest -m nightly tests/backbones ;;
        runs)
            "$python" -m pytest -m nightly --ignore tests/test_readme.py --ignore tests/test_qlora.py --ignore tests/selftest \
                --ignore tests/backbones
            ;;
        qlora) "$python" -m pytest -s -m nightly tests/test_qlora.py ;;
        mutations) "$python" tests/mutations.py ;;
        peft) "$python" tests/peft_suite.py ;;
        benches)
            local bench
            for bench in "layer --repeats 1" "dispatch --turns 1" "decide --repeats 1" "checkpoint --layers 2" \
                "latency --turns 1" "monitor --turns 2" plan; do
                echo "nightly: ldmole bench $bench"
                # shellcheck disable=SC2086  # a name and its options
                "$python" -m ldmole_dist.cli bench $bench || return
            done
            ;;
    esac
}

failed=()
for section in "${chosen[@]}"; do
    begun=$SECONDS
    # A section that fails does not end the others.
    run_section "$section" || failed+=("$section")
    echo "nightly: $section took $((SECONDS - begun)) s"
done
if ((${#failed[@]} > 0)); then
    die "failed: ${failed[*]}"
fi
