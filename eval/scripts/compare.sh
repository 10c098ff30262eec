#!/usr/bin/env bash
# Evaluate checkpoints alike: bash eval/scripts/compare.sh CHECKPOINT... --output DIR
# --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.compare "$@"
