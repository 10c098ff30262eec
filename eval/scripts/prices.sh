#!/usr/bin/env bash
# What a plan's prices say beside what rounding costs: bash eval/scripts/prices.sh --backend gptq --moments DIR --output FILE
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.prices "$@"
