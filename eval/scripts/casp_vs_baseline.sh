#!/usr/bin/env bash
# CASP against its baselines at equal bytes, table and plots from nothing: bash eval/scripts/casp_vs_baseline.sh [flags]
# Takes hours, resumes. --help explains every flag; --models, --backends, --bits and --seeds measure a part of it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.casp_vs_baseline --output "$root/eval/results/casp_vs_baseline" "$@"
