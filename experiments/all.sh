#!/usr/bin/env bash
# Every table and figure of the paper on one small model, from one tree of stages; each piece is computed once and kept.
#
#   MODEL=models/opt-mini DATA=data OUT=runs/experiments bash experiments/all.sh
#   bash experiments/all.sh --small        # a rehearsal: every table, of the toy on the CPU; no network, a few minutes
#
# Finished pieces are read back: the same command goes on where it was stopped. The tables are OUT/NAME.{json,csv,md},
# the pictures OUT/*.{png,svg,csv}; OUT/tree and OUT/programs (compiled) are only kept for going on. Variables,
# of which --small has other defaults:
#   MODEL     a dense OPT: hub id or folder; toy: the built-in one
#   DATA      folder with TASK/{train,validation}.jsonl[.gz] (default: from the Hugging Face hub)
#   OUT       default: runs/experiments
#   TASKS     default: sst2,rte,piqa
#   SEEDS     default: 0,1,2
#   ORDERS    tasks on which all six orders are compared (default: the first of TASKS)
#   STUDENT   a smaller model with MODEL's vocabulary, for bigger_teacher.py; default: trained now on TEXT
#   TEXT      text files to train that student on, with blanks between; without STUDENT and TEXT its row is left out
#   PLAN      options of the planner (default: below)
#   SIZE      options of training and evaluation (default: below, for a small model on two CPU cores)
#   SHAPE     options of the student's training (default: below)
#   DRY_RUN   if set, the commands are printed, not run
set -euo pipefail

here=$(dirname "$0")
case "${1:-}" in
    "") ;;
    --small)
        export JAX_PLATFORMS=cpu
        MODEL=${MODEL:-toy} TASKS=${TASKS:-toy} SEEDS=${SEEDS:-0} OUT=${OUT:-runs/small} TEXT=${TEXT:-$here/README.md}
        SIZE=${SIZE:---max-steps 1 --batch 8 --accumulation 1 --limit 32 --max-train-examples 64 --calibration 16}
        SHAPE=${SHAPE:---layers 1 --width 16 --heads 2 --steps 2 --batch 8 --window 16 --limit 32}
        ;;
    *) echo "all.sh: unknown argument $1; expected nothing or --small" >&2 && exit 1 ;;
esac
out=${OUT:-runs/experiments}
tasks=${TASKS:-sst2,rte,piqa}
first=${tasks%%,*}
read -ra plan <<<"${PLAN:---layers 1 --clusters 0.5 --score-merge low_rank --value-merge fit}"
read -ra size <<<"${SIZE:---max-steps 24 --batch 32 --accumulation 1 --lr 1e-4 --limit 872}"
read -ra shape <<<"${SHAPE:---layers 4 --width 128 --heads 4 --steps 600 --batch 32 --window 64 --task-share 0.7}"
data=()
if [ -n "${DATA:-}" ]; then data=(--data-dir "$DATA"); fi

run() {
    printf '%q ' "$@"
    echo
    if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

experiment() { # SCRIPT NAME TASKS [OPTIONS...]
    local script=$1 name=$2 on=$3
    shift 3
    run python "$here/$script.py" "$name" --task "$on" "${data[@]}" --seeds "${SEEDS:-0,1,2}" --out "$out" \
        "${plan[@]}" "${size[@]}" "$@"
}

if [ "$MODEL" = toy ]; then # as a folder, like any other
    MODEL=$out/toy
    if [ ! -d "$MODEL" ]; then run chai-jax export toy --out "$MODEL"; fi
fi
experiment configurations "$MODEL" "$tasks"
experiment methods "$MODEL" "$tasks"
experiment quant "$MODEL" "$tasks"
experiment target "$MODEL" "$tasks"
experiment layer_sweep "$MODEL" "$tasks"
experiment sensitivity "$MODEL" "$tasks"
experiment throughput "$MODEL" "$first"
experiment orders "$MODEL" "${ORDERS:-$first}"

student=${STUDENT:-}
if [ -z "$student" ] && [ -n "${TEXT:-}" ]; then
    student=$out/opt-micro
    read -ra text <<<"$TEXT"
    if [ ! -d "$student" ]; then
        run python "$here/train_test_model.py" --text "${text[@]}" --task "$tasks" "${data[@]}" --tokenizer "$MODEL" \
            "${shape[@]}" --out "$student"
    fi
fi
if [ -n "$student" ]; then experiment bigger_teacher "$student" "$first" --teacher "$MODEL"; fi
