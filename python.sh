#!/usr/bin/env bash
# What every script of every room runs: the Python of the environment that setup.sh made, with the arguments given.
# CASP_VENV names that environment (default: .venv beside this file). Where there is no .venv, the python3 in PATH.
set -euo pipefail
python="${CASP_VENV:-$(dirname "${BASH_SOURCE[0]}")/.venv}/bin/python"
if [[ ! -x "$python" ]]; then
    if [[ -n "${CASP_VENV:-}" ]]; then
        echo "error: CASP_VENV=$CASP_VENV holds no bin/python; make the environment with setup.sh or unset CASP_VENV." >&2
        exit 2
    fi
    python=python3
fi
if [[ -n "${CASP_PROCESSES:-}" ]]; then
    exec "$python" -m casp_entry.torchrun "$@" # so many ranks of what can be shared out among them: docs/scale.md
fi
exec "$python" "$@"
