#!/usr/bin/env bash
# Seconds a block and peak memory of every stage on a random model of a 7B one's shape: bash eval/scripts/time.sh --output FILE.json
#
# --help explains every flag. Other shapes: --hidden, --intermediate, --heads, --key-heads.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.time "$@"
