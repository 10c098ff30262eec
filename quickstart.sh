#!/usr/bin/env bash
# CASP from nothing to a report, without a GPU and without a model hub:  bash quickstart.sh
#
# Compresses the built-in LLaVA to 2 bits a weight with and without CASP, loads each result again through transformers,
# asks it questions about images, and writes a table and plots to runs/demo-llava/report. Every step resumes: after an
# interruption run it again. MODEL=demo-llama does the same with a text model.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$root"
model="${MODEL:-demo-llava}"
case "$model" in
    demo-llava) samples=128 ;;
    demo-llama) samples=32 ;; # of 512 tokens each
    *) echo "error: MODEL=$model is not built in; use demo-llava or demo-llama, or run the stages' scripts by hand." >&2 && exit 2 ;;
esac
runs="runs/$model"

say() { printf '\n== %s\n' "$*"; }

say "1/5 set-up: the virtual environment .venv"
bash setup.sh
began=$SECONDS

job=(--model "$model" --samples "$samples" --backend quip-sharp --bits 2.003 --moments "$runs/moments" --costs "$runs/costs")

say "2/5 QuIP#: every matrix on a trellis at 2 bits"
bash compress.sh "${job[@]}" --allocation uniform --output "$runs/quip-sharp-2bit"

say "3/5 CASP-QuIP#: the same bytes, ranks and bits chosen by what they cost the model"
bash compress.sh "${job[@]}" --output "$runs/casp-quip-sharp-2bit"

say "4/5 evaluation: text, questions about images, size"
bash eval/scripts/compare.sh "bf16=$model" "QuIP# 2-bit=$runs/quip-sharp-2bit" \
    "CASP-QuIP# 2-bit=$runs/casp-quip-sharp-2bit" \
    --windows 16 --questions 120 --batch-size 32 --max-new-tokens 4 --output "$runs/report" --update-cards

say "5/5 done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s: $runs/report/report.md"
