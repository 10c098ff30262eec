#!/usr/bin/env bash
# Text perplexity as JSON: bash eval/scripts/perplexity.sh --model DIR --dataset test
# --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.perplexity "$@"
