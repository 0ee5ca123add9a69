#!/usr/bin/env bash
# Progressive distillation from nothing to pictures, on handwritten digits: trains a model, distils it from 16 steps of
# two network calls each (guidance) to 4 steps of one, and draws both with the same seeds. A CPU is enough: two minutes
# of one core. A second run reuses what is there.
#
#   bash scripts/digits.sh [OUT]     outputs/digits unless given
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt

out=${1:-outputs/digits}
say() { printf '\n== %s\n' "$1"; }

draw() { # NAME FLAGS...: 100 digits, seed i shows i mod 10
    local name=$1
    shift
    python sample.py --config=configs/digits_uvit.py "$@" --seeds=0-99 --cost --out="$out/$name"
}

say "a U-ViT of handwritten digits: training from nothing"
python train.py --config=configs/digits_uvit.py --workdir="$out/digits"

say "its students of 8 and of 4 steps, with the guidance inside"
python distillate.py --config=configs/digits_uvit.py:progressive --config.distill.start_steps=16 \
    --config.distill.end_steps=4 --config.distill.updates=300 --config.distill.cfg_scale=2.5 \
    --checkpoint="$out/digits" --workdir="$out/students"

say "the same seeds from all of them"
draw base_16 --config.sampler.steps=16 --checkpoint="$out/digits"
draw base_4 --config.sampler.steps=4 --checkpoint="$out/digits"
draw student_8 --checkpoint="$out/students/steps_0008"
draw student_4 --checkpoint="$out/students/steps_0004"

say "what came out"
python -m libs.montage --seeds=0-19 --out="$out/montage.png" "base, 16 steps=$out/base_16" \
    "base, 4 steps=$out/base_4" "student, 8 steps=$out/student_8" "student, 4 steps=$out/student_4"
python -m libs.summary "$out"
echo "$out/montage.png shows the same seeds below each other, $out/students/pairs each student below its teacher."
