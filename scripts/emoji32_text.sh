#!/usr/bin/env bash
# Text to image in pixels from captioned shards: a text encoder of the captions' words, a U-ViT that learns from the
# shards, a LoRA student of a few steps (Flash Diffusion, 2406.02347), and their pictures. Run it again and it goes on.
#
#   bash scripts/emoji32_text.sh SHARDS [OUT] [FLAGS]     OUT is runs/emoji32_text unless given
#
# SHARDS are webdataset shards of captioned pictures: a .tar, a folder of them, or addresses (libs/data/shard_urls.py),
# relative ones from the repository. FLAGS, as --config.compute.precision=bf16, go to train.py, distillate.py, sample.py.
#
#   UPDATES=9000                  of the teacher
#   FLASH_UPDATES=60,60,80,100    of the student, in each stage
#   PROMPTS=OUT/captions.json     pictures' prompts: a text, a .txt with one a line, or a .json of COCO's captions
#   SEEDS=0-15                    pictures; seed i shows prompt i modulo their number
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
[ $# -ge 1 ] || fail "no shards given; usage: bash scripts/emoji32_text.sh SHARDS [OUT] [FLAGS]"
shards=$1 out=runs/emoji32_text
shift
[ ! -e "$shards" ] || shards=$(realpath "$shards")
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    out=$(realpath -m "$1")
    shift
fi
prompts=${PROMPTS:-}
[ ! -e "$prompts" ] || prompts=$(realpath "$prompts")
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt
mkdir -p "$out"
prompts=${prompts:-$out/captions.json}
updates=${FLASH_UPDATES:-60,60,80,100} seeds=${SEEDS:-0-15}
flags=(--config.data.path="$shards" --config.cond.text_encoder="$out/text_encoder" "$@")
say() { printf '\n== %s\n' "$1"; }

say "the captions and the text encoder"
python -m libs.data.caption_files --shards="$shards" --out="$out/captions.json"
[ -d "$out/text_encoder" ] || python -m libs.small_text_encoder --captions="$out/captions.json" --out="$out/text_encoder"

say "the teacher"
python train.py --config=configs/emoji32_text.py --config.train.steps="${UPDATES:-9000}" "${flags[@]}" \
    --workdir="$out/teacher"

say "the student"
python distillate.py --config=configs/emoji32_text.py:flash --config.distill.stage_updates="$updates" \
    --config.train.steps=$((${updates//,/+})) "${flags[@]}" --checkpoint="$out/teacher" --workdir="$out/student"

draw() { # NAME FLAGS...
    local name=$1
    shift
    python sample.py --config=configs/emoji32_text.py "${flags[@]}" "$@" --prompts="$prompts" --seeds="$seeds" \
        --out="$out/$name"
}
say "pictures of $prompts"
draw teacher_25 --checkpoint="$out/teacher" --config.sampler.steps=25
for steps in 4 2; do
    draw teacher_$steps --checkpoint="$out/teacher" --config.sampler.steps=$steps
    draw student_$steps --checkpoint="$out/student" --config.sampler.steps=$steps
done
python -m libs.montage --seeds="$seeds" --out="$out/pictures.png" "teacher, 25 guided steps=$out/teacher_25" \
    "student, 4 steps=$out/student_4" "student, 2 steps=$out/student_2" "teacher, 4 guided steps=$out/teacher_4" \
    "teacher, 2 guided steps=$out/teacher_2"
