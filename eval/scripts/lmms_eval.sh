#!/usr/bin/env bash
# Multimodal benchmarks with lmms-eval, as JSON: bash eval/scripts/lmms_eval.sh --model DIR --tasks mme,pope
# Needs the extra: pip install -r requirements-lmms-eval.txt. --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.lmms_eval "$@"
