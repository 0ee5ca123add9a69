#!/usr/bin/env bash
# CelebA-HQ 256 x 256 by diffusion_distiller's recipe: a database of the images, the model, its students of 512 to 8
# steps, and its two pictures.
#
#   bash scripts/celebahq256_unet.sh IMAGES [FLAGS]
#
# IMAGES is a folder of pictures, SIZE pixels or larger. FLAGS go to train.py, distillate.py and sample.py alike, as
# --config.train.grad_checkpoint=true. The usual lengths want a GPU; short ones, by the variables below, take the whole
# chain through a CPU. Run it again and it goes on.
#
#   METHOD=progressive          as the paper does it; hramchenko, as diffusion_distiller does
#   WORKDIR=runs/celebahq256    all that comes out: images/ (LMDB), base/, METHOD/ (students), METHOD_samples/, pictures
#   SIZE=256                    pixels of a side
#   UPDATES_BASE=50000          of the model: 150,000 images in batches of 3
#   START=1024 END=8            steps of the first teacher and of the last student
#   UPDATES=1667,...,3334       of each student: 5,000 images down to 64 steps, 10,000 from 32 on; or one number for all
#   SEEDS=0-7                   columns of the pictures
#   FULL=1024 FEW=16            steps of the model itself in the first picture
#   CLIPPING="0.8 1 1.2 2"      rows of the second
#   PRECISION=fp32              bf16 on a GPU
#   DISTIL_FLAGS=               of distillate.py alone, such as --config.distill.gamma=0.3
#   LAUNCH=python               or "accelerate launch --multi_gpu --num_processes 3"
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
[ $# -ge 1 ] || fail "no folder of images given; usage: bash scripts/celebahq256_unet.sh IMAGES [FLAGS]"
images=$(realpath -m "$1")
shift
[ -d "$images" ] || fail "$images is no folder; want one with CelebA-HQ's pictures"
method=${METHOD:-progressive}
case $method in
    progressive) sampler=ddim ;;
    hramchenko) sampler=ddpm ;;
    *) fail "METHOD=$method: choose from progressive, hramchenko" ;;
esac
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt

size=${SIZE:-256} start=${START:-1024} end=${END:-8} full=${FULL:-1024} few=${FEW:-16} seeds=${SEEDS:-0-7}
updates=${UPDATES:-1667,1667,1667,1667,3334,3334,3334}
workdir=${WORKDIR:-runs/celebahq256} launch=${LAUNCH:-python}
config=configs/celebahq256_unet.py students=$workdir/$method out=$workdir/${method}_samples
flags=(--config.data.path="$workdir/images" --config.data.image_size="$size"
       --config.compute.precision="${PRECISION:-fp32}" "$@")
say() { printf '\n== %s\n' "$1"; }

draw() { # NAME CONFIG FLAGS...: images of the seeds
    local name=$1 config=$2
    shift 2
    $launch sample.py --config="$config" "${flags[@]}" "$@" --seeds="$seeds" --out="$out/$name"
}

say "the images, $size x $size"
python prepare_data.py lmdb --size="$size" --out="$workdir/images" "$images"

say "the model"
$launch train.py --config=$config "${flags[@]}" --config.train.steps="${UPDATES_BASE:-50000}" --workdir="$workdir/base"

say "its students, from $start steps to $end"
# shellcheck disable=SC2086 # several flags in one variable
$launch distillate.py --config="$config:$method" "${flags[@]}" --config.distill.start_steps="$start" \
    --config.distill.end_steps="$end" --config.distill.updates="$updates" ${DISTIL_FLAGS:-} \
    --checkpoint="$workdir/base" --workdir="$students"

say "the model and its last student"
for steps in $full $few; do # by the student's sampler, so that a seed shows the same face
    draw "base_$steps" $config --config.sampler.name=$sampler --config.sampler.steps="$steps" \
        --checkpoint="$workdir/base"
done
draw "student_$end" $config --captures=5 --checkpoint="$students"
python -m libs.montage --seeds="$seeds" --out="$workdir/${method}_steps.png" "$full steps=$out/base_$full" \
    "$few steps, not distilled=$out/base_$few" "$end steps, distilled=$out/student_$end"

say "the last student by the clipped sampler"
rows=()
for value in ${CLIPPING:-0.8 1 1.2 2}; do
    draw "clipped_$value" $config:clipped --config.sampler.clipping_value="$value" --checkpoint="$students"
    rows+=("clipped at $value=$out/clipped_$value")
done
python -m libs.montage --seeds="$seeds" --out="$workdir/${method}_clipping.png" "${rows[@]}"

say "what came out"
echo "$workdir/${method}_steps.png, $workdir/${method}_clipping.png: the two pictures"
echo "$out/student_$end/montage.png: from noise to image; $students/pairs: each student below its teacher"
