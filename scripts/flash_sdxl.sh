#!/usr/bin/env bash
# Flash Diffusion (2406.02347) on Stable Diffusion XL: a LoRA of rank 64 for 4 steps, from captioned pictures.
#
#   bash scripts/flash_sdxl.sh PICTURES COCO [FLAGS]    see scripts/flash_pipeline.sh
#
# Activations are recomputed in the backward pass, as those of 1,024 pixels fill a GPU.
config=sdxl distil_flags=(--config.train.grad_checkpoint=true)
source "$(dirname "${BASH_SOURCE[0]}")/flash_pipeline.sh"
