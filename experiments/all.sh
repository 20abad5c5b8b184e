#!/usr/bin/env bash
# Every table and figure of the paper on one small model, from one tree of stages; each piece is computed once and kept.
#
#   MODEL=models/opt-mini DATA=data OUT=runs/experiments bash experiments/all.sh
#
# Finished pieces are read back: the same command goes on where it was stopped. The tables are OUT/NAME.{json,csv,md},
# the pictures OUT/*.{png,svg,csv}; OUT/tree and OUT/programs (compiled) are only kept for going on. Variables:
#   MODEL     a dense OPT: hub id or folder
#   DATA      folder with TASK/{train,validation}.jsonl[.gz] (default: from the Hugging Face hub)
#   OUT       default: runs/experiments
#   TASKS     default: sst2,rte,piqa
#   SEEDS     default: 0,1,2
#   ORDERS    tasks on which all six orders are compared (default: sst2)
#   SMALL     a smaller model with MODEL's vocabulary, the student of bigger_teacher.py; default: trained now on TEXT
#   TEXT      text files to train that student on, with blanks between; without SMALL and TEXT its row is left out
#   PLAN      options of the planner (default: below)
#   SIZE      options of training and evaluation (default: below, for a small model on two CPU cores)
#   DRY_RUN   if set, the commands are printed, not run
set -euo pipefail

here=$(dirname "$0")
out=${OUT:-runs/experiments}
tasks=${TASKS:-sst2,rte,piqa}
read -ra plan <<<"${PLAN:---layers 1 --clusters 0.5 --score-merge low_rank --value-merge fit}"
read -ra size <<<"${SIZE:---max-steps 24 --batch 32 --accumulation 1 --lr 1e-4 --limit 872}"
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

experiment configurations "$MODEL" "$tasks"
experiment methods "$MODEL" "$tasks"
experiment quant "$MODEL" "$tasks"
experiment target "$MODEL" "$tasks"
experiment layer_sweep "$MODEL" "$tasks"
experiment sensitivity "$MODEL" "$tasks"
experiment throughput "$MODEL" sst2
experiment orders "$MODEL" "${ORDERS:-sst2}"

small=${SMALL:-}
if [ -z "$small" ] && [ -n "${TEXT:-}" ]; then
    small=$out/opt-micro
    read -ra text <<<"$TEXT"
    if [ ! -d "$small" ]; then
        run python "$here/train_test_model.py" --text "${text[@]}" --task "$tasks" "${data[@]}" --tokenizer "$MODEL" \
            --layers 4 --width 128 --heads 4 --steps 600 --batch 32 --window 64 --task-share 0.7 --out "$small"
    fi
fi
if [ -n "$small" ]; then experiment bigger_teacher "$small" sst2 --teacher "$MODEL"; fi
