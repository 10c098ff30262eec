#!/usr/bin/env bash
# Collect the Hessians for QuIP#: bash quip-sharp/scripts/hfize_llava.sh [flags]
#
# Defaults are the paper's: LLaVA-1.5-7B (calibrated on images and text). Flags given here are passed on to the stage, --help explains each. Some uses:
#   bash quip-sharp/scripts/hfize_llava.sh --model demo-llava                      the built-in model
#   bash quip-sharp/scripts/hfize_llava.sh --token-weights attention            count tokens by the attention they get
# After SVD/scripts/svd_llava.sh it takes that stage's output; --from-original the model itself.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_quip_sharp.hessians --model llava-hf/llava-1.5-7b-hf "$@"
