#!/usr/bin/env bash
# Time and memory of the stages against width, depth, tokens and ranks, and what a model would take on other machines:
# bash eval/scripts/scale.sh --output eval/results/scale
#
# --help explains every flag. Again with the same folder: goes on. --cases with nothing after it only writes the tables.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.scale "$@"
