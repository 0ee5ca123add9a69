#!/usr/bin/env bash
# U-ViT-S/2 and S/2 (Deep) on MS-COCO 256 x 256 latents, text to image (FID 5.95 and 5.48, published), and AdaDiff's
# early exit on S/2 (certainty 0.87, 330,000 updates), whose settings are taken for Deep too.
#
#   bash scripts/mscoco_uvit.sh prepare [FOLDER]   train2014.zip, val2014.zip and annotations_trainval2014.zip are in
#                                                  FOLDER, else they are fetched (20 GB); writes latents, embeddings of
#                                                  the captions and of no text, and FID's statistics
#   bash scripts/mscoco_uvit.sh train              1,000,000 updates of 256 latents, if not the published weights
#   bash scripts/mscoco_uvit.sh finetune           330,000 updates of 256 latents, from the weights of U-ViT
#   bash scripts/mscoco_uvit.sh evaluate           30,000 images a row, each of a caption of val2014, by 50
#                                                  evaluations of DPM-Solver++
#
#   MODEL=small                                    or deep
#   AUTOENCODER=                                   file, folder or hub id of another than U-ViT's of Stable Diffusion
#   TEXT_ENCODER=                                  folder or hub id of another CLIP text model than ViT-L/14's
#
# Each stage runs alone, and the same command again goes on where it stopped. FLAGS behind a stage go to its command.
# scripts/uvit_stages.sh explains the variables that all U-ViT recipes share: DATA, WORKDIR, OUT, STATS, BASE, METHOD,
# EXIT, THRESHOLD, SAMPLES, ROWS, BENCHMARK, PRECISION, LAUNCH.
source "$(dirname "$0")/uvit_stages.sh"

model=${MODEL:-small}
case $model in
    small) weights=mscoco_uvit_small ;;
    deep) weights=mscoco_uvit_small_deep ;;
    *) fail "MODEL=$model: choose from small, deep" ;;
esac
config=mscoco_uvit_$model statistics=fid_stats_mscoco samples=30000 threshold=0.87
patience=1 # AdaDiff's text-to-image model has no such rule
images=$data/coco256_features captions=$data/coco/annotations/captions_val2014.json
data_flags=(--config.data.name=features --config.data.path="$images")
stats_flags=(--config.data.name=coco --config.data.path="$data/coco" --config.data.split=test)
model_flags=(${TEXT_ENCODER:+--config.cond.text_encoder="$TEXT_ENCODER"})
[ -f "$captions" ] || captions=$images/annotations/captions_val2014.json
eval_flags=(--prompts="$captions")
use_autoencoder autoencoder_kl

first_there() { # PATHS...
    local path
    for path in "$@"; do
        if [ -e "$path" ]; then echo "$path" && return; fi
    done
    fail "there is none of $*"
}

prepare_data() { # FLAGS... of prepare_data.py latents and text
    local split zip=$data/coco/annotations_trainval2014.zip images_of captions_of
    if [ -n "$folder" ]; then place coco; else fetch coco_train2014 coco_val2014 coco_annotations2014; fi
    for split in train val; do
        images_of=$(first_there "$data/coco/${split}2014.zip" "$data/coco/${split}2014")
        captions_of=$(first_there "$zip" "$data/coco/annotations/captions_${split}2014.json")
        fetch_autoencoder
        say "latents: $split"
        $launch prepare_data.py latents --config="configs/$config.py" "${model_flags[@]}" "$@" \
            --images="$images_of" --captions="$captions_of" --split=$split --out="$images"
        say "embeddings of the captions: $split"
        $launch prepare_data.py text --config="configs/$config.py" "${model_flags[@]}" "$@" \
            --captions="$captions_of" --split=$split --out="$images"
    done
    [ -f "$captions" ] || unpack "$zip" annotations/captions_val2014.json "$images"
}

run_stage "$@"
