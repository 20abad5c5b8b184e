#!/usr/bin/env bash
# The paper's experiment on one model: SST-2, RTE and PIQA, each clustered, distilled, quantized and tuned, evaluated
# after every stage. Needs nothing but `pip install "chai_jax[tpu]"`.
#
#   bash experiments/paper.sh MODEL [OPTIONS OF chai-jax run...]
#   bash experiments/paper.sh facebook/opt-125m                          # data parallel over all devices
#   bash experiments/paper.sh facebook/opt-1.3b --fsdp                   # 16 GB of masters and moments, split over 8
#   bash experiments/paper.sh --small                                    # a rehearsal: the toy on the CPU, a few minutes
#
# The settings are the paper's: AdamW, learning rate 2e-5 decaying linearly, 8 microbatches an update, 128 examples an
# update for distillation (1 epoch) and 64 for tuning (3 epochs); what is not named below is the program's default.
# When the time is up the state is saved and the status is 75: run the same command again to go on. Finished tasks are
# not computed again. Environment variables:
#   MINUTES   for all tasks together (default: 500, within a Kaggle session of 9 hours)
#   TASKS     default: sst2 rte piqa; with --small: toy
#   BACKEND   tpu (default), gpu or cpu; the run stops where JAX finds another
#   OUT       where the run folders go (default: runs); on a pod, a folder that all hosts share
#   DATA      folder with TASK/{train,validation}.jsonl[.gz] (default: from the Hugging Face hub)
#   DRY_RUN   if set, the commands are printed, not run
set -euo pipefail

if [ "$1" = --small ]; then
    export JAX_PLATFORMS=cpu
    BACKEND=cpu TASKS=${TASKS:-toy} OUT=${OUT:-runs/small}
    set -- toy --limit 32 --max-steps 2 --max-train-examples 256 "${@:2}"
fi
model=$1
shift
minutes=${MINUTES:-500}

for task in ${TASKS:-sst2 rte piqa}; do
    left=$((minutes - SECONDS / 60))
    if [ "$left" -lt 1 ]; then
        echo "the time is up before $task: run the same command again to go on" >&2
        exit 75
    fi
    command=(chai-jax run "$model" --task "$task" --lr 2e-5 --accumulation 8 --max-minutes "$left"
        --require-backend "${BACKEND:-tpu}" --out "${OUT:-runs}/${model##*/}-$task" "$@")
    if [ -n "${DATA:-}" ]; then command+=(--data-dir "$DATA"); fi
    printf '%q ' "${command[@]}"
    echo
    if [ -z "${DRY_RUN:-}" ]; then "${command[@]}"; fi
done
