#!/usr/bin/env bash
# Plan ranks and bits: bash plan.sh --model M --backend quip-sharp --bits 2.1 [flags]
#
# Prices what every linear may become (full rank or a rank, a format for each stored matrix) by what it costs the model,
# chooses the best within the budget, prints the plan and writes it as JSON that can be edited; the quantizing stages obey
# it with --plan. Needs the moments of the model: quip-sharp/scripts/hessian_offline_*.sh. --help explains each flag. Uses:
#   bash plan.sh --model demo-llama --backend quip-sharp --size 30MB             a size of the linears
#   bash plan.sh --model demo-llama --backend quip-sharp --allocation paper      the paper's ranks and bits
#   bash plan.sh --model demo-llama --backend gptq --bits 2.5 --no-low-rank      bits only
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$root/python.sh" -m casp.plan "$@"
