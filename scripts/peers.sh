#!/usr/bin/env bash
# What goes wrong with UNet caching in a real pipeline: the same checks on our policies and on DeepCache, tomesd, T-GATE
# and diffusers' own hooks, on a tiny Stable Diffusion with random weights. A CPU is enough, nothing but the packages is
# downloaded. Writes assets/results/safety/safety.json and its table in docs. Arguments go to
# python -m libs.pipelines.safety: bash scripts/peers.sh --tools=clockwork,deepcache --out=outputs/safety.json
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements-peers.txt

python -m libs.pipelines.safety --out=assets/results/safety/safety.json "$@"
python -m libs.tables README.md docs/*.md
