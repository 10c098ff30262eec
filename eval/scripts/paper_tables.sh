#!/usr/bin/env bash
# Rows of the paper's tables: bash eval/scripts/paper_tables.sh --row images/LLaVA-1.5-7B/casp-quip-sharp
#
# --dry-run says what every row runs, and resolves models, plans and tasks without the hub; --help explains each flag.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec bash "$root/python.sh" -m casp_eval.paper_tables "$@"
