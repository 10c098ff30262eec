#!/usr/bin/env bash
# What a 2-bit model keeps, by what it was calibrated on: bash eval/scripts/calibration_mix.sh --model demo-llama
# --work runs/mix --output FILE.json demo-speeches@32 demo-mixed@32. --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.calibration_mix "$@"
