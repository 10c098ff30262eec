#!/usr/bin/env bash
# Speed of quantized layers against dense ones: bash eval/scripts/speed.sh --output DIR      writes DIR/speed.json
# OMP_NUM_THREADS sets the threads of a CPU. --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.speed "$@"
