#!/usr/bin/env bash
# The whole chain of latent U-ViTs on a folder of captioned pictures: an autoencoder, a text encoder of the captions'
# words, then U-ViTs in the latents: in continuous time, in discrete time, and from text. Run it again and it goes on.
#
#   bash scripts/emoji32_uvit.sh PICTURES [OUT]     runs/emoji32 unless given
#
# PICTURES is a folder, or a .tar of one (a webdataset): images of 32 pixels or more, the captions of 00000.png in
# 00000.txt, one a line.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
[ $# -ge 1 ] || fail "no pictures given; usage: bash scripts/emoji32_uvit.sh PICTURES [OUT]"
pictures=$(realpath -m "$1") out=$(realpath -m "${2:-runs/emoji32}")
[ -e "$pictures" ] || fail "$pictures is not there; want a folder or a .tar of captioned pictures"
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt
mkdir -p "$out"
say() { printf '\n== %s\n' "$1"; }

say "the pictures and their captions"
if [ -f "$pictures" ]; then
    if [ ! -d "$out/pictures" ]; then
        rm -rf "$out/pictures.tmp"
        mkdir "$out/pictures.tmp"
        tar -xf "$pictures" -C "$out/pictures.tmp"
        mv "$out/pictures.tmp" "$out/pictures"
    fi
    pictures=$out/pictures
fi
python -m libs.data.caption_files --images="$pictures" --out="$out/captions.json"
[ -d "$out/text_encoder" ] || python -m libs.small_text_encoder --captions="$out/captions.json" --out="$out/text_encoder"

say "the autoencoder"
python train.py --config=configs/emoji32_autoencoder.py --config.data.path="$pictures" --workdir="$out/autoencoder"
autoencoder=$out/autoencoder/autoencoder
scale=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["scaling_factor"])' "$autoencoder/config.json")
codec=(--config.codec.pretrained="$autoencoder" --config.codec.scale_factor="$scale")
text=(--config.cond.text_encoder="$out/text_encoder")

say "latents of the pictures, hidden states of the captions"
python prepare_data.py latents --config=configs/emoji32_uvit.py "${codec[@]}" --images="$pictures" \
    --captions="$out/captions.json" --out="$out/features"
python prepare_data.py text --config=configs/emoji32_uvit.py:text "${text[@]}" --captions="$out/captions.json" \
    --out="$out/features"

fit() { # NAME CONFIG FLAGS...
    local name=$1 config=$2
    shift 2
    say "U-ViT, $name"
    python train.py --config="$config" "${codec[@]}" "$@" --config.data.path="$out/features" --workdir="$out/$name"
}
fit continuous configs/emoji32_uvit.py
fit discrete configs/emoji32_uvit.py:discrete
fit text configs/emoji32_uvit.py:text "${text[@]}"

say "pictures of 32 seeds"
for regime in continuous discrete; do
    python sample.py --config=configs/emoji32_uvit.py "${codec[@]}" --checkpoint="$out/$regime" --seeds=0-31 \
        --out="$out/samples_$regime"
done
python sample.py --config=configs/emoji32_uvit.py:text "${codec[@]}" "${text[@]}" --checkpoint="$out/text" \
    --prompts="$out/captions.json" --seeds=0-31 --out="$out/samples_text"
echo "$out/samples_*: the pictures; $out/autoencoder/previews: held-out pictures above what the autoencoder keeps"
