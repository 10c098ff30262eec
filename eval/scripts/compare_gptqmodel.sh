#!/usr/bin/env bash
# Our GPTQ against gptqmodel's at equal settings, error and time in one run: bash eval/scripts/compare_gptqmodel.sh
# Needs the extra: pip install -r requirements-gptqmodel.txt. PYTHON names another interpreter that has it.
# Writes eval/results/gptqmodel.json unless --output says otherwise; --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -x "$python" ]] || python=python3
exec "$python" -m casp_gptq.compare_gptqmodel "$@"
