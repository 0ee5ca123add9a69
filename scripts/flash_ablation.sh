#!/usr/bin/env bash
# What the losses and the start times of Flash Diffusion (2406.02347) bring: LoRA students of the released CIFAR-10 UNet,
# each from several seeds of the training with the same updates and learning rate, scored at 4 calls.
#
#   bash scripts/flash_ablation.sh [FLAGS]
#
# FLAGS go to distillate.py, for every student, as --config.data.path=DIR or --config.train.lr=1e-4. Run it again and it
# goes on.
#
#   ARMS="distil dmd adversarial uniform modes"
#        distil: the distillation loss alone; dmd: with the DMD loss; adversarial: with the adversarial loss; uniform: all
#        three, which start anywhere on the teacher's grid; modes: all three, which start by pi_s, the default
#   SEEDS="0 1"                        of the training
#   UPDATES=8,12,15,15                 of a student, in each of the four stages
#   RANK=32                            of the LoRA
#   SAMPLES=500                        images a score, of the seeds 0, 1, ...
#   PRECISION=fp32                     bf16 on a GPU
#   LAUNCH=python                      or "accelerate launch --multi_gpu --num_processes 8"
#   WORKDIR=runs/flash_ablation        students and scored images
#   OUT=outputs/flash_ablation         scores, ARM_SEED.json, and table.md
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $1" >&2; exit 2; }
arms=${ARMS:-distil dmd adversarial uniform modes}
fields() { # ARM: what it changes
    case $1 in
        distil) echo --config.distill.dmd_scale=0 --config.distill.adversarial_scale=0 ;;
        dmd) echo --config.distill.adversarial_scale=0 ;;
        adversarial) echo --config.distill.dmd_scale=0 ;;
        uniform) echo --config.distill.start=uniform ;;
        modes) ;;
        *) return 1 ;;
    esac
}
for arm in $arms; do
    fields "$arm" >/dev/null || fail "ARMS: '$arm' is none; choose from distil, dmd, adversarial, uniform, modes"
done
source scripts/env.sh requirements.txt
workdir=${WORKDIR:-runs/flash_ablation} out=${OUT:-outputs/flash_ablation} updates=${UPDATES:-8,12,15,15}
launch=${LAUNCH:-python} precision=--config.compute.precision=${PRECISION:-fp32}
mkdir -p "$out"

for seed in ${SEEDS:-0 1}; do
    for arm in $arms; do
        name=${arm}_$seed
        printf '\n== %s, seed %s\n' "$arm" "$seed"
        # shellcheck disable=SC2046  # several words
        $launch distillate.py --config=configs/cifar10_unet.py:flash "$precision" --config.seed="$seed" \
            --config.distill.lora_rank="${RANK:-32}" --config.distill.stage_updates="$updates" \
            --config.train.steps=$((${updates//,/+})) --config.distill.teacher_steps=8 \
            --config.distill.discriminator_lr=1e-4 --config.train.batch_size=16 --config.train.lr=1e-3 \
            --config.train.decay_from=0.5 $(fields "$arm") "$@" --workdir="$workdir/$name"
        $launch eval.py --config=configs/cifar10_unet.py "$precision" --checkpoint="$workdir/$name" \
            --config.sampler.steps=4 --seeds="0-$((${SAMPLES:-500} - 1))" --keep_images="$workdir/images/$name" \
            --out="$out/$name.json"
    done
done
printf '<!-- flash_ablation: *_*.json -->\n' >"$out/table.md"
python -m libs.tables "$out/table.md"
cat "$out/table.md"
