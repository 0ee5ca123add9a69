#!/usr/bin/env bash
# Flash Diffusion (2406.02347) on CIFAR-10: two students of the released UNet, the whole network and a LoRA; scores and
# pictures at 4 and 2 steps beside DDIM and DPM-Solver++ with as many.
#
#   bash scripts/cifar10_flash.sh [FLAGS]
#
# FLAGS go to distillate.py, as --config.data.path=DIR or --config.data.download=true for CIFAR-10's files, or
# --config.train.lr=1e-4. Run it again and it goes on.
#
#   WORKDIR=runs/cifar10_flash     students go to WORKDIR/whole and WORKDIR/lora
#   OUT=outputs/cifar10_flash      scores (.json), the scored images, table.md and a picture for each number of steps
#   STUDENTS="whole lora"
#   RANK=64                        of the LoRA
#   UPDATES=5000                   of each of the four stages
#   SAMPLES=500                    images a score, of the seeds 0, 1, ...
#   PRECISION=fp32                 bf16 on a GPU
#   LAUNCH=python                  or "accelerate launch --multi_gpu --num_processes 8": an update's images, and the
#                                  seeds of a score, are shared among the GPUs, and batches stay as large as they are
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $1" >&2; exit 2; }
students=${STUDENTS:-whole lora}
for student in $students; do
    case $student in
        whole | lora) ;;
        *) fail "STUDENTS: '$student' is none; choose from whole, lora" ;;
    esac
done
source scripts/env.sh requirements.txt
workdir=${WORKDIR:-runs/cifar10_flash} out=${OUT:-outputs/cifar10_flash}
updates=${UPDATES:-5000} samples=${SAMPLES:-500}
launch=${LAUNCH:-python} precision=--config.compute.precision=${PRECISION:-fp32}
columns=$((samples < 16 ? samples : 16))
say() { printf '\n== %s\n' "$1"; }

score() { # NAME METHODS FLAGS...
    local name=$1 config=configs/cifar10_unet.py$2
    shift 2
    $launch eval.py --config="$config" "$precision" "$@" --config.sampler.steps="$steps" \
        --seeds="0-$((samples - 1))" --keep_images="$out/$name" --out="$out/$name.json"
}

for student in $students; do
    say "the student: $student"
    rank=0
    [ "$student" = whole ] || rank=${RANK:-64}
    $launch distillate.py --config=configs/cifar10_unet.py:flash "$precision" --config.distill.lora_rank="$rank" \
        --config.distill.stage_updates="$updates,$updates,$updates,$updates" --config.train.steps=$((4 * updates)) \
        "$@" --workdir="$workdir/$student"
done

for steps in 4 2; do
    say "scores at $steps steps"
    score "${steps}_ddim" ""
    score "${steps}_dpm_solver_pp" :dpm_solver_pp
    rows=("DDIM=$out/${steps}_ddim" "DPM-Solver++=$out/${steps}_dpm_solver_pp")
    for student in $students; do
        score "${steps}_$student" "" --checkpoint="$workdir/$student"
        rows+=("student, $student=$out/${steps}_$student")
    done
    python -m libs.montage --seeds="0-$((columns - 1))" --out="$out/steps_$steps.png" "${rows[@]}"
done
printf '<!-- results: [42]_*.json -->\n' >"$out/table.md"
python -m libs.tables "$out/table.md"
cat "$out/table.md"
