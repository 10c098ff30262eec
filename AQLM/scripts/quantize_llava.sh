#!/usr/bin/env bash
# Quantize with AQLM and fine-tune: bash AQLM/scripts/quantize_llava.sh [flags]
#
# Defaults are the paper's: LLaVA-1.5-7B (calibrated on images and text), two codebooks of 256 entries over groups of 8 weights
# (2 bits a weight besides codebooks and scales). Flags given here are passed on to the stage, --help explains each.
# Some uses:
#   bash AQLM/scripts/quantize_llava.sh --model demo-llava --entries int8   the built-in model; small codebooks
#   bash AQLM/scripts/quantize_llava.sh --scheme 4x8g8 --moments DIR        4 bits, with the output of hfize_llava.sh
#   bash AQLM/scripts/quantize_llava.sh --ft-epochs 0 --export aqlm         not fine-tuned; also for the package aqlm
# After SVD/scripts/svd_llava.sh it takes that stage's output and spends the bytes which the low-rank W_q and W_k freed
# on more bits where block influence is highest (CASP-AQLM); --from-original quantizes the model itself.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_aqlm --model llava-hf/llava-1.5-7b-hf --scheme 2x8g8 "$@"
