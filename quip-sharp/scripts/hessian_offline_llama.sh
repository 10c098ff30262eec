#!/usr/bin/env bash
# Collect the moments that every stage reads: bash quip-sharp/scripts/hessian_offline_llama.sh [flags]
# (hfize_llama.sh is the same.)
#
# Defaults are the paper's: Llama-2-7B (calibrated on text). Flags given here are passed on to the stage, --help explains each.
# Some uses:
#   bash quip-sharp/scripts/hessian_offline_llama.sh --model demo-llama                             the built-in model
#   bash quip-sharp/scripts/hessian_offline_llama.sh --token-weights attention --no-gradients    forward only
# After SVD/scripts/svd_llama.sh it takes that stage's output; --from-original the model itself.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp.moments --model meta-llama/Llama-2-7b-hf "$@"
