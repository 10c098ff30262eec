#!/usr/bin/env bash
# Ask a checkpoint in the shell: bash eval/scripts/chat.sh --model DIR --image FILE
# --help explains every flag. The Python of the repository's .venv is used when there is one, else the one in PATH.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
exec "$python" -m casp_eval.chat "$@"
