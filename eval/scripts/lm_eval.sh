#!/usr/bin/env bash
# Text benchmarks with lm-eval, as JSON: bash eval/scripts/lm_eval.sh --model DIR --tasks arc_easy,hellaswag
# Needs the extra: pip install -r requirements-lm-eval.txt. --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.lm_eval "$@"
