#!/usr/bin/env bash
# Quantize with AQLM and fine-tune: bash AQLM/scripts/quantize_llama.sh [flags]
#
# Defaults are the paper's: Llama-2-7B (calibrated on text), two codebooks of 256 entries over groups of 8 weights
# (2 bits a weight besides codebooks and scales). Flags given here are passed on to the stage, --help explains each.
# Some uses:
#   bash AQLM/scripts/quantize_llama.sh --model demo-llama --entries int8   the built-in model; small codebooks
#   bash AQLM/scripts/quantize_llama.sh --scheme 4x8g8 --moments DIR        4 bits, with the output of hfize_llama.sh
#   bash AQLM/scripts/quantize_llama.sh --ft-epochs 0 --export aqlm         not fine-tuned; also for the package aqlm
# After SVD/scripts/svd_llama.sh it takes that stage's output and spends the bytes which the low-rank W_q and W_k freed
# on more bits where block influence is highest (CASP-AQLM); --from-original quantizes the model itself.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_aqlm --model meta-llama/Llama-2-7b-hf --scheme 2x8g8 "$@"
