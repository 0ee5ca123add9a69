#!/usr/bin/env bash
# The grid of configs/compare.py: quality and cost of every cell (assets/results/compare/), the picture
# (assets/compare.png) and its table in docs. A second run goes on where the first was stopped. Arguments go to
# python -m libs.compare: bash scripts/compare.sh --cells='*_8' --max_minutes=60
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt

python -m libs.compare "$@"
python -m libs.compare --plot
python -m libs.tables README.md docs/*.md
