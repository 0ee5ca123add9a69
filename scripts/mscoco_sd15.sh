#!/usr/bin/env bash
# Stable Diffusion 1.5 on MS-COCO, plain, with Clockwork and with encoder propagation: FID, CLIP score and time.
#
#   bash scripts/mscoco_sd15.sh COCO 2017-5K     5,000 captions of val2017, one an image (the default)
#   bash scripts/mscoco_sd15.sh COCO 2014-30K    30,000 captions of val2014, one an image, images in a fixed order
#
# COCO is the folder with annotations/captions_val2017.json and val2017/ (or 2014), as cocodataset.org packs them.
# FID is between images of 256 pixels, the real ones cropped to their centre square; the CLIP score sees 512 pixels.
# A GPU is needed: 5,000 images are 250,000 steps of a UNet of 860 M parameters. Run it again and it goes on.
# LAUNCH="accelerate launch --multi_gpu --num_processes 8" shares the seeds among GPUs.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
[ $# -ge 1 ] || fail "no COCO folder given; usage: bash scripts/mscoco_sd15.sh COCO [2017-5K|2014-30K]"
case ${2:-2017-5K} in
    2017-5K) year=2017 seeds=0-4999 ;;
    2014-30K) year=2014 seeds=0-29999 ;;
    *) fail "'$2' is no protocol; choose from 2017-5K, 2014-30K" ;;
esac
coco=$(realpath -m "$1")
captions=$coco/annotations/captions_val$year.json real=$coco/val$year
[ -f "$captions" ] || fail "$captions is not there; cocodataset.org has it in annotations_trainval$year.zip"
[ -d "$real" ] || fail "$real is not there; cocodataset.org has it as val$year.zip"
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt
launch=${LAUNCH:-python} out=outputs/mscoco_sd15/$year

row() { # NAME METHOD SCHEDULER STEPS FLAGS...: one row of the table
    local name=$1 config=configs/sd15.py:$2 scheduler=$3 steps=$4
    shift 4
    printf '\n== %s\n' "$name"
    $launch sample.py --config="$config" --config.pipeline.scheduler="$scheduler" --config.pipeline.steps="$steps" "$@" \
        --config.compute.precision=fp16 --config.compute.rows=8 --prompts="$captions" --seeds=$seeds --out="$out/$name"
    python eval.py --config="$config" --images="$out/$name" --config.eval.metrics=fid --image_size=256 \
        --config.eval.reference="$real" --out="$out/$name.fid.json"
    python eval.py --config="$config" --images="$out/$name" --config.eval.metrics=clip_score --prompts="$captions" \
        --out="$out/$name.clip.json"
}

# Faster Diffusion's rows: 50 DDIM steps, the paper's nine key steps, prior noise of 0.003
row ddim_50 full ddim 50
row ddim_50_encoder_propagation encoder_propagation ddim 50 \
    --config.policy.parallel=true --config.policy.prior_noise=0.003
row ddim_50_clockwork clockwork ddim 50 --config.policy.clock=4
# Clockwork's rows: 8 steps of DPM-Solver++, every second in full
row dpm_solver_pp_8 full dpm_solver_pp 8
row dpm_solver_pp_8_clockwork clockwork dpm_solver_pp 8 --config.policy.clock=2
# what plain sampling does in the time that the accelerated rows take
row ddim_37 full ddim 37
row dpm_solver_pp_6 full dpm_solver_pp 6
