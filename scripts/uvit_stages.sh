# Sourced by the recipes *_uvit.sh: the stages that they share. A recipe sets the variables below, defines what its data
# needs (prepare_data), and calls `run_stage "$@"`.
#
#   config        a file of configs/, without folder and ending
#   weights       name of the published model in scripts/downloads.tsv
#   statistics    name of FID's reference statistics there
#   samples       images that the published score was measured on
#   threshold     certainty of the early exit
#   patience      in-blocks that must be certain in AdaDiff's own rule
#   images        folder of the images or latents to train on; data_flags: the data section that reads them
#   model_flags   of train.py and eval.py
#   finetune_flags, eval_flags    of one of them
#
# What its user may set:
#
#   DATA=data                 data sets, pretrained/, fid_stats/
#   WORKDIR=runs/CONFIG       train/ and METHOD/ (the early-exit model)
#   OUT=outputs/CONFIG        scores (.json), the scored images, table.md and pictures
#   STATS=published           own: makes FID's statistics from the images at hand; for every stage
#   BASE=                     model to fine-tune and to compare with: WORKDIR/train, or else U-ViT's weights
#   METHOD=early_exit         early_exit_paper: the paper's loss and heads instead of the released ones
#   EXIT=                     model to evaluate early exit on: WORKDIR/METHOD, or AdaDiff's weights
#   THRESHOLD=                certainty, instead of the published one
#   SAMPLES=                  images a score, of the seeds 0, 1, ...; instead of the published number
#   ROWS="before after per_sample schedule pictures"    what evaluate makes: scores of full depth before and after
#                             fine-tuning, of early exit image by image and of a fixed depth a step, and pictures of the
#                             exits; released: a score as AdaDiff's code samples, one image at a time; fixed: of one
#                             exit layer; split: of few layers in the first calls and all in the rest, as DuoDiff;
#                             fewer_steps: of full depth in fewer steps
#   FIXED=60% SPLIT=3x50%,100%x50%    the schedules of the rows fixed and split
#   STEPS=                    sampler steps of the row fewer_steps: as many as cost the time of the row schedule
#   BENCHMARK=1,16,128        images at a time of the timed loops; "" times none
#   PRECISION=                fp32, bf16 or fp16, instead of the config's
#   LAUNCH=python             or "accelerate launch --multi_gpu --num_processes 8": an update's images, and the seeds of
#                             a score, are shared among the GPUs, and batches stay as large as they are
set -euo pipefail
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }
say() { printf '\n== %s\n' "$1"; }
published() { awk -F '\t' -v name="$1" '$1 == name { print $2 }' scripts/downloads.tsv; }
fetch() { DATA=$data bash scripts/download.sh "$@"; }

# The autoencoders of a latent model: AUTOENCODER, or the published files, which prepare fetches. Latents are made with
# autoencoder_kl, and decoded with NAME.
use_autoencoder() { # NAME
    decoder=$1
    encoder_flags=(--config.codec.pretrained="${AUTOENCODER:-$data/$(published autoencoder_kl)}")
    model_flags+=(--config.codec.pretrained="${AUTOENCODER:-$data/$(published "$decoder")}")
}
fetch_autoencoder() { [ -n "${AUTOENCODER:-}" ] || fetch autoencoder_kl "$decoder"; }

# What a zip holds under NAME, to FOLDER/NAME.
unpack() { # ZIP NAME FOLDER
    [ ! -e "$3/$2" ] || return 0
    say "unpacking $2"
    rm -rf "$3/unpacked"
    python -c "import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as file:
    names = [name for name in file.namelist() if name.startswith(sys.argv[2])]
    file.extractall(sys.argv[3], names)" "$1" "$2" "$3/unpacked"
    mkdir -p "$(dirname "$3/$2")"
    mv "$3/unpacked/$2" "$3/$2"
    rm -r "$3/unpacked"
}

# data/NAME is the folder given to prepare, by a link unless it lies there; without a folder, NAME must be there.
place() { # NAME
    if [ -z "$folder" ]; then
        [ -d "$data/$1" ] || fail "$data/$1 is not there, and prepare was given no folder"
        return
    fi
    [ -d "$folder" ] || fail "$folder is no folder"
    [ ! "$folder" -ef "$data/$1" ] || return 0
    [ -L "$data/$1" ] || [ ! -e "$data/$1" ] || fail "$data/$1 is there, and is another folder than $folder"
    mkdir -p "$data"
    ln -sfn "$folder" "$data/$1"
}

prepare() { # FLAGS... of prepare_data.py
    prepare_data "$@"
    say "reference statistics ($stats)"
    if [ "$stats" = published ]; then
        fetch "$statistics"
    else
        python prepare_data.py stats --config="configs/$config.py" "${stats_flags[@]}" --features=inception \
            "${inception[@]}" --out="$reference"
    fi
}

train() { # FLAGS... of train.py
    say "$config: training from nothing"
    $launch train.py --config="configs/$config.py" "${flags[@]}" "${data_flags[@]}" "$@" --workdir="$workdir/train"
}

finetune() { # FLAGS... of train.py
    find_base
    say "$config: uncertainty heads, and the layer-wise loss ($method)"
    $launch train.py --config="configs/$config.py:$method" "${flags[@]}" "${data_flags[@]}" "${finetune_flags[@]}" \
        "$@" --checkpoint="$base" --workdir="$workdir/$method"
}

find_base() { # the model before fine-tuning
    base=${BASE:-}
    if [ -z "$base" ] && [ -d "$workdir/train/ckpts" ]; then
        base=$workdir/train
    elif [ -z "$base" ]; then
        fetch "$weights"
        base=$data/$(published "$weights")
    fi
}

score() { # ROW FLAGS...: one row of the table
    local row=$1
    shift
    say "$config: $row"
    $launch eval.py "${flags[@]}" "${eval_flags[@]}" "${inception[@]}" --config.eval.metrics=fid \
        --config.eval.reference="$reference" --config.eval.cost_images=16 \
        ${BENCHMARK:+--benchmark --config.eval.benchmark_rows="$BENCHMARK"} "$@" --seeds="0-$((samples - 1))" \
        --keep_images="$out/$row" --out="$out/$row.json"
}

early_exit() { # ROW FLAGS...
    local row=$1
    shift
    score "$row" --config="configs/$config.py:$method" --checkpoint="$exit_model" \
        --config.policy.threshold="$threshold" "$@"
}

picture() { # FLAGS...: exits by step and image, uncertainty maps, predicted against true certainty
    local calibration=("${data_flags[@]}")
    [ -d "$images" ] || calibration=(--data_images=0)
    say "$config: pictures of the exits"
    $launch -m libs.exits.report --config="configs/$config.py:$method" "${flags[@]}" "${calibration[@]}" \
        "${eval_flags[@]}" --checkpoint="$exit_model" --config.policy.threshold="$threshold" "$@" \
        --seeds="0-$((samples < 64 ? samples - 1 : 63))" --out="$out/exits"
}

# Steps of full depth that take as long as a schedule's: its own steps times the share of the layers that it runs.
equal_steps() { # SCORE of the schedule
    [ -f "$1" ] || fail "ROWS: fewer_steps goes by the row schedule, and $1 is not there; or set STEPS"
    python -c 'import json, sys
held = json.load(open(sys.argv[1]))
print(max(1, int(held["sampler"]["steps"] * held["policy"]["executed_ratio"] + 0.5)))' "$1"
}

evaluate() { # FLAGS... of eval.py
    local exit_model=${EXIT:-$workdir/$method} row steps
    [ -f "$reference" ] || fail "$reference is not there; the stage prepare makes it"
    find_base
    for row in ${ROWS:-before after per_sample schedule pictures}; do
        case $row in
            before) score 1_before --config="configs/$config.py" --checkpoint="$base" "$@" ;;
            after) score 2_after --config="configs/$config.py" --checkpoint="$exit_model" "$@" ;;
            per_sample) early_exit 3_per_sample "$@" ;;
            schedule) early_exit 4_schedule --config.policy.mode=schedule "$@" ;;
            fixed) early_exit 6_fixed --config.policy.mode=schedule --config.policy.schedule="${FIXED:-60%}" "$@" ;;
            split) early_exit 7_split --config.policy.mode=schedule \
                --config.policy.schedule="${SPLIT:-3x50%,100%x50%}" "$@" ;;
            fewer_steps)
                steps=${STEPS:-$(equal_steps "$out/4_schedule.json")}
                score 8_fewer_steps --config="configs/$config.py" --checkpoint="$exit_model" "$@" \
                    --config.sampler.steps="$steps" ;;
            released) early_exit 5_released --config.policy.mode=batch_mean --config.policy.patience="$patience" \
                --config.policy.joint=false --config.compute.rows=1 "$@" ;;
            pictures) picture "$@" ;;
            *) fail "ROWS: '$row' is none; choose from before, after, per_sample, schedule, released, fixed, split," \
                "fewer_steps, pictures" ;;
        esac
    done
    if ls "$out"/[1-8]_*.json >/dev/null 2>&1; then
        printf '<!-- results: [1-8]_*.json -->\n' >"$out/table.md"
        python -m libs.tables "$out/table.md"
        cat "$out/table.md"
    fi
}

run_stage() {
    local stage=${1:-} usage="usage: bash $0 prepare [FOLDER] | train | finetune | evaluate [FLAGS]"
    case $stage in
        prepare | train | finetune | evaluate) shift ;;
        "") fail "no stage given; $usage" ;;
        *) fail "'$stage' is no stage; $usage" ;;
    esac
    folder=
    if [ "$stage" = prepare ] && [[ ${1:---} != --* ]]; then
        folder=$(cd "$started_in" && realpath -m "$1")
        shift
    fi
    stats=${STATS:-published} method=${METHOD:-early_exit} launch=${LAUNCH:-python}
    case $stats in published | own) ;; *) fail "STATS=$stats: choose from published, own" ;; esac
    case $method in
        early_exit | early_exit_paper) ;;
        *) fail "METHOD=$method: choose from early_exit, early_exit_paper" ;;
    esac
    workdir=${WORKDIR:-runs/$config} out=${OUT:-outputs/$config}
    threshold=${THRESHOLD:-$threshold} samples=${SAMPLES:-$samples}
    BENCHMARK=${BENCHMARK-1,16,128}
    reference=$data/$(published "$statistics")
    [ "$stats" = published ] || reference=${reference%.npz}_own.npz
    flags=("${model_flags[@]}" ${PRECISION:+--config.compute.precision="$PRECISION"})
    inception=()
    if [ -f "$data/$(published inception)" ]; then inception=(--inception_weights="$data/$(published inception)"); fi
    source scripts/env.sh requirements.txt
    "$stage" "$@"
}

data=${DATA:-data} patience=2
data_flags=() stats_flags=() model_flags=() finetune_flags=() eval_flags=()
