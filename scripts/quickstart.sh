#!/usr/bin/env bash
# From nothing to pictures: samples the two released CIFAR-10 models, then trains, distils and samples a small
# model of handwritten digits. Needs Python 3.11+; a CPU is enough. A second run reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt

out=${1:-outputs/quickstart}
say() { printf '\n== %s\n' "$1"; }

say "U-ViT on CIFAR-10: 16 seeds, three samplers, 50 evaluations each"
for method in full dpm_solver dpm_solver_pp; do
    python sample.py --config=configs/cifar10_uvit_tiny.py:$method --seeds=0-15 --cost --out="$out/uvit_$method"
done

say "class-conditional UNet on CIFAR-10: the same seeds, 10 evaluations"
python sample.py --config=configs/cifar10_unet.py:dpm_solver_pp --config.sampler.steps=10 --seeds=0-15 --cost \
    --out="$out/unet_dpm_solver_pp"

say "a U-ViT of handwritten digits: training from nothing"
python train.py --config=configs/digits_uvit.py --workdir="$out/digits"
python sample.py --config=configs/digits_uvit.py --checkpoint="$out/digits" --seeds=0-99 --cost \
    --out="$out/digits_samples"

say "progressive distillation: half the steps"
python distillate.py --config=configs/digits_uvit.py:progressive --checkpoint="$out/digits" --workdir="$out/student"
python sample.py --config=configs/digits_uvit.py --checkpoint="$out/student" --seeds=0-99 --cost \
    --out="$out/student_samples"

say "what came out"
python -m libs.summary "$out"
