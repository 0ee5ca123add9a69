#!/usr/bin/env bash
# The whole suite: style, then tests. Arguments go to pytest: bash scripts/test.sh -k seeds
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements-dev.txt

ruff check .
python -m pytest -q "$@"
