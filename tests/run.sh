#!/usr/bin/env bash
# The one test command: bash tests/run.sh [--slow] [ARGUMENTS OF PYTEST]
# Sets up what it needs, checks lint and format, then runs pytest; --slow adds the longer end-to-end checks.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash setup.sh dev

marks=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [[ "$argument" == --slow ]]; then
        marks=()
    else
        arguments+=("$argument")
    fi
done

cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}" # more threads slow tiny matrices down
export HF_HUB_OFFLINE=1
export CASP_CACHE="${CASP_CACHE:-$root/.cache}"

bash python.sh -m ruff check .
bash python.sh -m ruff format --check .
exec bash python.sh -m pytest ${marks[@]+"${marks[@]}"} ${arguments[@]+"${arguments[@]}"}
