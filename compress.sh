#!/usr/bin/env bash
# Compress a model, the whole job: bash compress.sh --model M --bits 2.1 --backend quip-sharp --output DIR [flags]
#
# Collects moments, plans ranks and bits, makes W_q and W_k low-rank where that pays, quantizes, fine-tunes and evaluates
# if asked. Says first what it will do, how large the outcome will be and about how long it takes; after an interruption
# the same command goes on. --help explains each flag. Some uses:
#   bash compress.sh --model demo-llama --backend quip-sharp                     the built-in model at 2.1 bits
#   bash compress.sh --model DIR --backend gptq --size 3GB --whole-checkpoint    a size of the checkpoint
#   bash compress.sh --model DIR --backend quip-sharp --ft-epochs 2              with both fine-tunings
#   bash compress.sh --model DIR --backend quip-sharp --plan plan.json           an edited plan
#   bash compress.sh --model DIR --backend quip-sharp --evaluate                 and a report of both models
#   bash compress.sh --recipe recipe.yaml --output DIR               all settings from a file
#   bash compress.sh --model DIR --backend quip-sharp --dry-run                  say what would be done
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$root/python.sh" -m casp.job "$@"
