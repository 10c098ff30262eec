#!/usr/bin/env bash
# A page in the browser to try a checkpoint with a picture: bash eval/scripts/demo.sh --model DIR
# --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.demo "$@"
