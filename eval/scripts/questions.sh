#!/usr/bin/env bash
# Answers to questions about images as JSON: bash eval/scripts/questions.sh --model DIR --dataset test
# --help explains every flag. The Python of the repository's .venv is used when there is one, else the one in PATH.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
exec "$python" -m casp_eval.questions "$@"
