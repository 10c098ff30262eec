#!/usr/bin/env bash
# Our GPTQ against gptqmodel's at equal settings, error and time in one run: bash eval/scripts/compare_gptqmodel.sh
# Needs the extra: pip install -r requirements-gptqmodel.txt (CASP_VENV may name an environment of its own for it).
# Writes eval/results/gptqmodel.json unless --output says otherwise; --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_gptq.compare_gptqmodel "$@"
