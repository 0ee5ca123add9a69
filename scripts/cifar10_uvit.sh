#!/usr/bin/env bash
# U-ViT-S/2 on CIFAR-10 (FID 3.11, published) and AdaDiff's early exit on it (certainty 0.92).
#
#   bash scripts/cifar10_uvit.sh prepare [FOLDER]   CIFAR-10 is in FOLDER, else fetched; FID's statistics
#   bash scripts/cifar10_uvit.sh train              500,000 updates of 128 images, if not the published weights
#   bash scripts/cifar10_uvit.sh finetune           75,000 updates of 512 images, from the weights of U-ViT
#   bash scripts/cifar10_uvit.sh evaluate           50,000 images a row, 1,000 steps of Euler-Maruyama each
#
# Each stage runs alone, and the same command again goes on where it stopped. FLAGS behind a stage go to its command.
# scripts/uvit_stages.sh explains the variables that all U-ViT recipes share: DATA, WORKDIR, OUT, STATS, BASE, METHOD,
# EXIT, THRESHOLD, SAMPLES, ROWS, BENCHMARK, PRECISION, LAUNCH.
# The published lengths want GPUs. 500 seeds by DPM-Solver fit a CPU:
#
#   SAMPLES=500 PRECISION=bf16 BENCHMARK= bash scripts/cifar10_uvit.sh evaluate --config.sampler.name=dpm_solver \
#       --config.sampler.grid=logsnr --config.sampler.order=3 --config.sampler.t_end=1e-4 --config.sampler.steps=50
source "$(dirname "$0")/uvit_stages.sh"

config=cifar10_uvit_small weights=cifar10_uvit_small statistics=fid_stats_cifar10 samples=50000 threshold=0.92
images=$data/cifar10
data_flags=(--config.data.path="$images" --config.data.download=true)
stats_flags=("${data_flags[@]}")

prepare_data() {
    if [ -n "$folder" ]; then
        place cifar10
    else
        python -c "import sys, torchvision; torchvision.datasets.CIFAR10(sys.argv[1], download=True)" "$data/cifar10"
    fi
}

run_stage "$@"
