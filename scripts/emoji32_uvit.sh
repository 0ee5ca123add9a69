#!/usr/bin/env bash
# The whole chain of latent U-ViTs on a folder of captioned pictures: an autoencoder, a text encoder of the captions'
# words, then U-ViTs in the latents: in continuous time, in discrete time, and from text. Run it again and it goes on.
#
#   bash scripts/emoji32_uvit.sh PICTURES [OUT] [-- FLAGS]
#
# PICTURES is a folder, or a .tar of one (a webdataset): images of 32 pixels or more, the captions of 00000.png in
# 00000.txt, one a line. OUT is runs/emoji32 unless given. FLAGS go to train.py for every U-ViT (not the autoencoder):
# -- --config.train.steps=5000
#
# What its user may set:
#
#   REGIMES="continuous discrete text"    the U-ViTs to train and sample
#   PROMPTS=                  what the text model draws: a .txt file with one a line, or a .json file of COCO's captions;
#                             instead of the pictures' own captions
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
usage="usage: bash scripts/emoji32_uvit.sh PICTURES [OUT] [-- FLAGS]"
places=() flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do places+=("$1"); shift; done
[ $# -eq 0 ] || { shift; flags=("$@"); }
[ ${#places[@]} -ge 1 ] || fail "no pictures given; $usage"
[ ${#places[@]} -le 2 ] || fail "'${places[2]}' is one too many, flags of train.py stand after --; $usage"
pictures=$(realpath -m "${places[0]}") out=$(realpath -m "${places[1]:-runs/emoji32}")
[ -e "$pictures" ] || fail "$pictures is not there; want a folder or a .tar of captioned pictures"
regimes=${REGIMES:-continuous discrete text}
for regime in $regimes; do
    case $regime in
        continuous | discrete | text) ;;
        *) fail "REGIMES: '$regime' is none; choose from continuous, discrete, text" ;;
    esac
done
prompts=$(realpath -m "${PROMPTS:-$out/captions.json}")
[ -z "${PROMPTS:-}" ] || [ -f "$prompts" ] || fail "PROMPTS=$PROMPTS is not there"
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
[ -d "$out/text_encoder" ] ||
    python -m libs.small_text_encoder --captions="$out/captions.json" --out="$out/text_encoder"

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

config() { # REGIME
    case $1 in continuous) echo configs/emoji32_uvit.py ;; *) echo "configs/emoji32_uvit.py:$1" ;; esac
}
for regime in $regimes; do
    case $regime in
        text) cond=("${text[@]}") shown=(--prompts="$prompts") ;;
        *) cond=() shown=() ;;
    esac
    say "U-ViT, $regime"
    python train.py --config="$(config "$regime")" "${codec[@]}" "${cond[@]}" --config.data.path="$out/features" \
        "${flags[@]}" --workdir="$out/$regime"
    say "pictures of 32 seeds, $regime"
    python sample.py --config="$(config "$regime")" "${codec[@]}" "${cond[@]}" --checkpoint="$out/$regime" \
        "${shown[@]}" --seeds=0-31 --out="$out/samples_$regime"
done
echo "$out/samples_*: the pictures; $out/autoencoder/previews: held-out pictures above what the autoencoder keeps"
