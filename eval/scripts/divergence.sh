#!/usr/bin/env bash
# Divergence of a checkpoint from its original, as JSON: bash eval/scripts/divergence.sh --model DIR --original demo-llava
# --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.divergence "$@"
