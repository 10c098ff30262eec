#!/usr/bin/env bash
# Quantize with GPTQ: bash GPTQ/scripts/quantize_llama.sh [flags]
#
# Defaults are the paper's: Llama-2-7B (calibrated on text), 2 bits, groups of 128.
# Flags given here are passed on to the stage, --help explains each. Some uses:
#   bash GPTQ/scripts/quantize_llama.sh --model demo-llama --bits 3     the built-in model at 3 bits
#   bash GPTQ/scripts/quantize_llama.sh --bits 4 --export gptq         also as a checkpoint for gptqmodel
# After SVD/scripts/svd_llama.sh it takes that stage's output and spends the bytes which the low-rank W_q and W_k
# freed on more bits where block influence is highest (CASP-GPTQ); --from-original quantizes the model itself.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_gptq --model meta-llama/Llama-2-7b-hf --bits 2 --group-size 128 "$@"
