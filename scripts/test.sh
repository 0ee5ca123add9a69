#!/usr/bin/env bash
# The whole suite: style, then tests. Arguments go to pytest: bash scripts/test.sh -k seeds
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements-dev.txt

ruff check .
# Files of tests side by side; a worker takes about 2 GB.
python -m pytest -q -n auto --maxprocesses=4 --dist=loadfile "$@"
