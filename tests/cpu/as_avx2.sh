#!/usr/bin/env bash
# Run the tests as on a CPU with AVX2 and nothing newer, on an Intel CPU that has more: bash tests/cpu/as_avx2.sh [PYTEST ARGUMENTS]
# Needs cc and an environment from setup.sh; what is told to the process is in avx2_only.c.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
cc -O1 -shared -fPIC -o "$scratch/avx2_only.so" "$here/avx2_only.c"
cd "$here/../.."
# A handler of faults that pytest installs would take the place of ours.
LD_PRELOAD="$scratch/avx2_only.so" bash python.sh -m pytest -p no:faulthandler "$@"
