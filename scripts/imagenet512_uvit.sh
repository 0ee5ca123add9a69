#!/usr/bin/env bash
# U-ViT-L/4 and H/4 on ImageNet 512 x 512 latents (FID 4.67 and 4.05, published), and early exit on them. AdaDiff
# published no settings for these models: those of its 256 x 256 model are taken (certainty 0.92, 110,000 updates).
#
#   bash scripts/imagenet512_uvit.sh prepare FOLDER   FOLDER has train/: class folders, or files n01440764_10026.JPEG;
#                                                   writes latents, of flips too, and FID's statistics
#   bash scripts/imagenet512_uvit.sh train            500,000 updates of 1,024 latents, if not the
#                                                   published weights
#   bash scripts/imagenet512_uvit.sh finetune         110,000 updates of 1,024 latents, from the weights of U-ViT
#   bash scripts/imagenet512_uvit.sh evaluate         50,000 images a row, 50 evaluations each: large by DPM-Solver of
#                                                   order 3, huge by DPM-Solver++
#
#   MODEL=large                                     or huge
#   AUTOENCODER=                                    file, folder or hub id of another than U-ViT's of Stable Diffusion
#
# Each stage runs alone, and the same command again goes on where it stopped. FLAGS behind a stage go to its command.
# scripts/uvit_stages.sh explains the variables that all U-ViT recipes share: DATA, WORKDIR, OUT, STATS, BASE, METHOD,
# EXIT, THRESHOLD, SAMPLES, ROWS, BENCHMARK, PRECISION, LAUNCH.
source "$(dirname "$0")/uvit_stages.sh"

model=${MODEL:-large}
case $model in
    large) use_autoencoder autoencoder_kl ;;
    huge) use_autoencoder autoencoder_kl_ema ;;
    *) fail "MODEL=$model: choose from large, huge" ;;
esac
config=imagenet512_uvit_$model weights=$config statistics=fid_stats_imagenet512 samples=50000 threshold=0.92
images=$data/imagenet512_features
data_flags=(--config.data.name=features --config.data.path="$images")
stats_flags=(--config.data.name=imagenet --config.data.path="$data/imagenet")
finetune_flags=(--config.train.steps=110000)

prepare_data() {
    place imagenet
    fetch_autoencoder
    say "latents of the training images and of their flips"
    $launch prepare_data.py latents --config="configs/$config.py" "${encoder_flags[@]}" "$@" \
        --images="$data/imagenet/train" --flips --out="$images"
}

run_stage "$@"
