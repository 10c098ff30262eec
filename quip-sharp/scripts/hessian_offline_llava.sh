#!/usr/bin/env bash
# Collect the moments that every stage reads: bash quip-sharp/scripts/hessian_offline_llava.sh [flags]
# (hfize_llava.sh is the same.)
#
# Defaults are the paper's: LLaVA-1.5-7B (calibrated on images and text). Flags given here are passed on to the stage, --help explains each.
# Some uses:
#   bash quip-sharp/scripts/hessian_offline_llava.sh --model demo-llava                             the built-in model
#   bash quip-sharp/scripts/hessian_offline_llava.sh --token-weights attention --no-gradients    forward only
# After SVD/scripts/svd_llava.sh it takes that stage's output; --from-original the model itself.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp.moments --model llava-hf/llava-1.5-7b-hf "$@"
