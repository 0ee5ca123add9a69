#!/usr/bin/env bash
# U-ViT-S/4 on CelebA 64 x 64 (FID 2.87, published) and AdaDiff's early exit on it (certainty 0.95).
#
#   bash scripts/celeba64_uvit.sh prepare [FOLDER]   img_align_celeba/ and list_eval_partition.txt are in FOLDER, else
#                                                    they are fetched; FID's statistics
#   bash scripts/celeba64_uvit.sh train              500,000 updates of 128 images, if not the published weights
#   bash scripts/celeba64_uvit.sh finetune           200,000 updates of 1,024 images, from the weights of U-ViT
#   bash scripts/celeba64_uvit.sh evaluate           50,000 images a row, 1,000 steps of Euler-Maruyama each
#
# Each stage runs alone, and the same command again goes on where it stopped. FLAGS behind a stage go to its command.
# scripts/uvit_stages.sh explains the variables that all U-ViT recipes share: DATA, WORKDIR, OUT, STATS, BASE, METHOD,
# EXIT, THRESHOLD, SAMPLES, ROWS, BENCHMARK, PRECISION, LAUNCH.
source "$(dirname "$0")/uvit_stages.sh"

config=celeba64_uvit_small weights=celeba64_uvit_small statistics=fid_stats_celeba64 samples=50000 threshold=0.95
images=$data/celeba
data_flags=(--config.data.name=celeba --config.data.path="$images")
stats_flags=("${data_flags[@]}")

prepare_data() {
    if [ -n "$folder" ] || [ -d "$data/celeba/img_align_celeba" ]; then
        place celeba
        return
    fi
    fetch celeba_split celeba_images
    unpack "$data/celeba/img_align_celeba.zip" img_align_celeba "$data/celeba"
}

run_stage "$@"
