#!/usr/bin/env bash
# The default whitening against the paper's, at two keep ratios, everything else equal:
#   bash SVD/experiments/compare_whitening.sh MODEL OUTPUT [flags of the stage, e.g. --samples 32]
# Factors W_q and W_k four times and writes the comparison on the test split to OUTPUT (report.md, report.json, plots).
set -euo pipefail
if [[ $# -lt 2 || "$1" == -* ]]; then
    echo "usage: bash SVD/experiments/compare_whitening.sh MODEL OUTPUT [flags of the SVD stage]" >&2
    [[ "${1:-}" == --help ]] && exit 0
    exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
model="$1" output="$2"
shift 2

rows=("bf16=$model")
for keep in 0.25 0.5; do
    for whitening in input attention; do
        folder="$output/checkpoints/$whitening-$keep"
        bash "$root/SVD/scripts/svd_llama.sh" --model "$model" --whitening "$whitening" --keep-ratio "$keep" \
            --output "$folder" "$@"
        rows+=("$whitening, keep $keep=$folder")
    done
done
bash "$root/eval/scripts/compare.sh" "${rows[@]}" --windows 16 --questions 180 --output "$output"
