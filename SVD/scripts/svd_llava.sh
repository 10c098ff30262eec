#!/usr/bin/env bash
# Stage 1 for LLaVA: low-rank W_q and W_k of the language model, whitened by the attention's output.
#   bash SVD/scripts/svd_llava.sh                      the paper's model and keep ratio
#   bash SVD/scripts/svd_llava.sh --model demo-llava   the built-in model, in minutes on a CPU
# Later flags win over those below; --help explains each. Writes runs/<model>/svd, from where the
# quantization scripts go on, and resumes what was interrupted.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_svd --model llava-hf/llava-1.5-7b-hf --keep-ratio 0.25 "$@"
