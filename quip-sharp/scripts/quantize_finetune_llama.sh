#!/usr/bin/env bash
# Quantize with QuIP# and fine-tune: bash quip-sharp/scripts/quantize_finetune_llama.sh [flags]
#
# Defaults are the paper's: Llama-2-7B (calibrated on text), 2 bits. Flags given here are passed on to the stage, --help explains each.
# Some uses:
#   bash quip-sharp/scripts/quantize_finetune_llama.sh --model demo-llama              the built-in model
#   bash quip-sharp/scripts/quantize_finetune_llama.sh --moments DIR --bits 4       with the output of hessian_offline_llama.sh
#   bash quip-sharp/scripts/quantize_finetune_llama.sh --ft-epochs 0                quantize only
# After SVD/scripts/svd_llama.sh it takes that stage's output and spends the bytes which the low-rank W_q and W_k freed
# on more bits where block influence is highest (CASP-QuIP#); --from-original quantizes the model itself.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_quip_sharp --model meta-llama/Llama-2-7b-hf --bits 2 "$@"
