#!/usr/bin/env bash
# Progressive distillation on CIFAR-10: the released UNet from 1,024 steps to 2, then the released U-ViT, which predicts
# eps and so is first trained on to v (stage 0). Scores and pictures of all students.
#
#   bash scripts/cifar10_unet.sh [FLAGS]
#
# FLAGS go to distillate.py, as --config.data.path=DIR or --config.data.download=true for CIFAR-10's files, or
# --config.train.batch_size=32. The paper's 50,000 updates a student want GPUs. Run it again and it goes on.
#
#   WORKDIR=runs/cifar10_students  students go to WORKDIR/cifar10_unet and WORKDIR/cifar10_uvit_tiny
#   OUT=outputs/cifar10_students   scores (.json), the scored images and a picture for each model
#   MODELS="cifar10_unet cifar10_uvit_tiny"
#   START=1024 END=2
#   UPDATES=                       of each student, one number or one each; else the paper's
#   CONVERT_UPDATES=10000          of stage 0
#   SAMPLES=500                    images a score, of the seeds 0, 1, ...
#   PRECISION=fp32                 bf16 on a GPU
#   LAUNCH=python                  or "accelerate launch --multi_gpu --num_processes 8": an update's images, and the
#                                  seeds of a score, are shared among the GPUs, and batches stay as large as they are
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt

start=${START:-1024} end=${END:-2} samples=${SAMPLES:-500}
launch=${LAUNCH:-python} precision=--config.compute.precision=${PRECISION:-fp32}
columns=$((samples < 16 ? samples : 16))
say() { printf '\n== %s\n' "$1"; }

score() { # NAME FLAGS...
    local name=$1
    shift
    $launch eval.py --config="configs/$model.py" "$precision" "$@" --seeds="0-$((samples - 1))" \
        --keep_images="$out/$name" --out="$out/$name.json"
}

for model in ${MODELS:-cifar10_unet cifar10_uvit_tiny}; do
    workdir=${WORKDIR:-runs/cifar10_students}/$model out=${OUT:-outputs/cifar10_students}/$model
    say "$model: students, from $start steps to $end"
    $launch distillate.py --config="configs/$model.py:progressive" "$precision" --config.distill.start_steps="$start" \
        --config.distill.end_steps="$end" ${UPDATES:+--config.distill.updates="$UPDATES"} \
        --config.distill.convert_updates="${CONVERT_UPDATES:-10000}" "$@" --workdir="$workdir"

    say "$model: scores"
    score base
    rows=("not distilled, 50 steps=$out/base")
    for ((steps = start / 2; steps >= end; steps /= 2)); do
        student=$(printf 'steps_%04d' "$steps")
        score "$student" --checkpoint="$workdir/$student"
        rows+=("student, $steps steps=$out/$student")
    done
    python -m libs.montage --seeds="0-$((columns - 1))" --out="$out/students.png" "${rows[@]}"
    echo "$out/students.png shows all students, $workdir/pairs each one below its teacher"
done
