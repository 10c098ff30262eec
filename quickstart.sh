#!/usr/bin/env bash
# CASP from nothing to a report, without a GPU and without a model hub:  bash quickstart.sh
#
# Compresses the built-in LLaVA three ways, loads each result again through transformers, asks it questions about
# images, and writes a table and plots to runs/demo-llava/report. Every step resumes: after an interruption run it
# again. MODEL=demo-llama does the same with a text model.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$root"
model="${MODEL:-demo-llava}"
case "$model" in
    demo-llava) kind=llava samples=64 ;;
    demo-llama) kind=llama samples=16 ;; # of 512 tokens each
    *) echo "error: MODEL=$model is not built in; use demo-llava or demo-llama, or run the stages' scripts by hand." >&2 && exit 2 ;;
esac
runs="runs/$model"

say() { printf '\n== %s\n' "$*"; }

say "1/6 set-up: the virtual environment .venv"
bash setup.sh
began=$SECONDS

say "2/6 SVD: low-rank W_q and W_k, a quarter of their parameters kept"
bash "SVD/scripts/svd_$kind.sh" --model "$model" --samples "$samples"

say "3/6 GPTQ at 2 bits, without low rank"
bash "GPTQ/scripts/quantize_$kind.sh" --model "$model" --bits 2 --samples "$samples" --from-original

say "4/6 CASP-GPTQ: the factors and the rest at the same bytes, the freed bytes to the blocks that matter most"
bash "GPTQ/scripts/quantize_$kind.sh" --model "$model" --bits 2 --samples "$samples"

say "5/6 evaluation: text, questions about images, size"
bash eval/scripts/compare.sh "bf16=$model" "SVD=$runs/svd" "GPTQ 2-bit=$runs/gptq-2bit" \
    "CASP-GPTQ=$runs/casp-gptq-2bit" \
    --windows 16 --questions 120 --batch-size 32 --max-new-tokens 4 --output "$runs/report" --update-cards

say "6/6 done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s: $runs/report/report.md"
