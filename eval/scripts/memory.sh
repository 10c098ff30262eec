#!/usr/bin/env bash
# Peak memory of quantizing, a model and one ten times its size: bash eval/scripts/memory.sh --output FILE.json
# --help explains every flag. The Python of the repository's .venv is used when there is one, else the one in PATH.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
exec "$python" -m casp_eval.memory "$@"
