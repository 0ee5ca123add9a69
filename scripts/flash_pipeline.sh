# Sourced by flash_sd15.sh and flash_sdxl.sh, which set `config`, a file of configs/ without folder and ending, and
# `distil_flags`: shards of captioned pictures, a LoRA student with the published settings, its images, their scores.
#
#   bash scripts/flash_NAME.sh PICTURES COCO [FLAGS]
#
# PICTURES is a folder of images with their captions beside them (a.jpg with a.txt or a.json), of which shards are made;
# or a folder of shards, or their addresses, such as "https://host/{0000..0099}.tar" (libs/data/shard_urls.py), relative
# ones from the repository. COCO is the folder with annotations/captions_val2017.json and val2017/, as cocodataset.org
# packs them. FLAGS go to distillate.py. A GPU is needed. Run it again and it goes on.
#
#   WORKDIR=runs/flash_NAME     shards/, and distilled/, the run; distilled/student is what pipelines load
#   OUT=outputs/flash_NAME      images and scores of the student at 4 and 2 steps, and of DPM-Solver++ at 4
#   MIN_SCORE=0                 lowest aesthetic score of a picture; published: 6. Pictures without a score are left out
#   SAMPLES=5000                images a score
#   LAUNCH="accelerate launch --mixed_precision bf16"    with --multi_gpu --num_processes 2 two GPUs share an update's
#                               images, and the seeds of a score; batches stay as large as they are
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
say() { printf '\n== %s\n' "$1"; }

[ $# -ge 2 ] || fail "PICTURES and COCO are missing; usage: bash $0 PICTURES COCO [FLAGS]"
pictures=$1 coco=$(realpath -m "$2")
shift 2
captions=$coco/annotations/captions_val2017.json real=$coco/val2017
[ -f "$captions" ] || fail "$captions is not there; cocodataset.org has it in annotations_trainval2017.zip"
[ -d "$real" ] || fail "$real is not there; cocodataset.org has it as val2017.zip"
[ ! -d "$pictures" ] || pictures=$(realpath "$pictures")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh requirements.txt
launch=${LAUNCH:-accelerate launch --mixed_precision bf16} samples=${SAMPLES:-5000} score=${MIN_SCORE:-0}
workdir=${WORKDIR:-runs/flash_$config} out=${OUT:-outputs/flash_$config}

if [ -d "$pictures" ] && ! compgen -G "$pictures/*.tar" >/dev/null; then
    say "shards of the pictures"
    python prepare_data.py webdataset --min_score="$score" --out="$workdir/shards" "$pictures"
    pictures=$workdir/shards
fi

say "$config: a student of 4 steps"
$launch distillate.py --config="configs/$config.py:flash" --config.data.path="$pictures" \
    --config.data.min_score="$score" "${distil_flags[@]}" "$@" --workdir="$workdir/distilled"

row() { # NAME FLAGS...: images of COCO's captions, and their scores
    local name=$1
    shift
    say "$config: $name"
    $launch sample.py --config="configs/$config.py" "$@" --config.compute.precision=fp16 --config.compute.rows=8 \
        --prompts="$captions" --seeds="0-$((samples - 1))" --out="$out/$name"
    python eval.py --config="configs/$config.py" --images="$out/$name" --config.eval.metrics=fid --image_size=256 \
        --config.eval.reference="$real" --out="$out/$name.fid.json"
    python eval.py --config="configs/$config.py" --images="$out/$name" --config.eval.metrics=clip_score \
        --prompts="$captions" --out="$out/$name.clip.json"
}

for steps in 4 2; do
    row "student_$steps" --checkpoint="$workdir/distilled" --config.pipeline.steps=$steps
done
row dpm_solver_pp_4 --config.pipeline.scheduler=dpm_solver_pp --config.pipeline.steps=4
