#!/usr/bin/env bash
# Answers to questions about images as JSON: bash eval/scripts/questions.sh --model DIR --dataset test
# --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.questions "$@"
