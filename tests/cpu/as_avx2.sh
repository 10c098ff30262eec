#!/usr/bin/env bash
# Run tests as on a CPU with AVX2 alone, on an Intel CPU with more: bash tests/cpu/as_avx2.sh [ARGUMENTS OF PYTEST]
# Needs cc, and an environment from setup.sh; avx2_only.c says how.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
cc -O1 -shared -fPIC -o "$scratch/avx2_only.so" "$here/avx2_only.c"
cd "$here/../.."
# A handler of faults that pytest installs would take the place of ours.
LD_PRELOAD="$scratch/avx2_only.so" bash python.sh -m pytest -p no:faulthandler "$@"
