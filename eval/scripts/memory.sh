#!/usr/bin/env bash
# Peak memory of quantizing, a model and one ten times its size: bash eval/scripts/memory.sh --output FILE.json
# --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.memory "$@"
