#!/usr/bin/env bash
# Ask a checkpoint in the shell: bash eval/scripts/chat.sh --model DIR --image FILE
# --help explains every flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.chat "$@"
