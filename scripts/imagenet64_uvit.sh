#!/usr/bin/env bash
# U-ViT-M/4 and L/4 on ImageNet 64 x 64 (FID 5.85 and 4.26, published), and early exit on them. AdaDiff published no
# settings for these models: those of its ImageNet 256 model are taken (certainty 0.92, 110,000 updates).
#
#   bash scripts/imagenet64_uvit.sh prepare FOLDER   FOLDER has train/: class folders, or files n01440764_10026.JPEG
#   bash scripts/imagenet64_uvit.sh train            300,000 updates of 1,024 images, if not the published weights
#   bash scripts/imagenet64_uvit.sh finetune         110,000 updates of 1,024 images, from the weights of U-ViT
#   bash scripts/imagenet64_uvit.sh evaluate         50,000 images a row by DPM-Solver of order 3, 50 evaluations each
#
#   MODEL=mid                                        or large
#
# Each stage runs alone, and the same command again goes on where it stopped. FLAGS behind a stage go to its command.
# scripts/uvit_stages.sh explains the variables that all U-ViT recipes share: DATA, WORKDIR, OUT, STATS, BASE, METHOD,
# EXIT, THRESHOLD, SAMPLES, ROWS, BENCHMARK, PRECISION, LAUNCH.
source "$(dirname "$0")/uvit_stages.sh"

model=${MODEL:-mid}
case $model in mid | large) ;; *) fail "MODEL=$model: choose from mid, large" ;; esac
config=imagenet64_uvit_$model weights=$config statistics=fid_stats_imagenet64 samples=50000 threshold=0.92
images=$data/imagenet
data_flags=(--config.data.name=imagenet --config.data.path="$images")
stats_flags=("${data_flags[@]}")
finetune_flags=(--config.train.steps=110000)

prepare_data() { place imagenet; }

run_stage "$@"
