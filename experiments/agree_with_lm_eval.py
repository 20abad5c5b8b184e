"""Does `chai_jax.evaluate` agree with the lm-evaluation-harness, example by example?

    python experiments/agree_with_lm_eval.py $MODEL --data-dir $DATA --tasks sst2,rte,piqa --out runs/agreement

Needs torch and lm-eval[hf]. The harness runs the dense OPT $MODEL with transformers in float32 on the CPU; its own
tasks read the rows that `evaluate` reads. Expected: no log-likelihood further apart than 1e-3 nats, equal accuracies,
equal standard errors, the same predictions (but where the best two choices lie within 1e-3 nats, which are listed).
Writes agreement.json; exits with 1 where the two disagree. The last line on stdout is the record as JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.data.tasks import get_task, load_rows
from chai_jax.errors import InputError
from chai_jax.files.atomic import write_json
from chai_jax.files.store import load
from chai_jax.measure.evaluate import Result, evaluate
from chai_jax.measure.lm_eval import write_tasks

TOLERANCE = 1e-3  # nats

Record = dict[str, Any]


def run_harness(model: str, rows: dict[str, list[Any]], batch_size: int) -> Record:
    """Results and samples of the lm-evaluation-harness with transformers' OPT."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), rows)
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "dtype": "float32"},
            tasks=list(rows),
            task_manager=TaskManager(include_path=folder),
            batch_size=batch_size,
            device="cpu",
            log_samples=True,
            bootstrap_iters=1,  # 0 would turn standard errors off; those of means are closed forms
        )


def compare(theirs: np.ndarray, ours: np.ndarray, norms: np.ndarray) -> Record:
    """Two sets of log-likelihoods [examples, choices], divided by `norms` before the best one is chosen.

    A margin is narrow if `TOLERANCE` nats on one choice could turn it.
    """
    theirs, ours = theirs / norms, ours / norms
    ranked = np.sort(theirs, axis=1)
    narrow = ranked[:, -1] - ranked[:, -2] < TOLERANCE / norms.min(axis=1)
    different = theirs.argmax(1) != ours.argmax(1)
    return {
        "different_predictions": np.flatnonzero(different).tolist(),
        "narrow_margins": np.flatnonzero(narrow).tolist(),
        "agrees": not (different & ~narrow).any(),
    }


def agreement(name: str, harness: Record, ours: Result) -> Record:
    """One task's record: the largest difference, the predictions, and the reported figures side by side."""
    samples = sorted(harness["samples"][name], key=lambda sample: sample["doc_id"])
    theirs = np.array([[response[0] for response in sample["filtered_resps"]] for sample in samples])
    greedy = np.array([[response[1] for response in sample["filtered_resps"]] for sample in samples])
    reported, metrics = harness["results"][name], ours.metrics()
    difference = float(np.abs(theirs - ours.loglikelihoods).max())
    record: Record = {"n": len(samples), "max_difference_nats": difference}
    measures = {"acc": np.ones_like(theirs)}
    if get_task(name).normalised:
        measures["acc_norm"] = ours.characters
    for measure, norms in measures.items():
        record[measure] = {
            **compare(theirs, ours.loglikelihoods, norms),
            "harness": [reported[f"{measure},none"], reported[f"{measure}_stderr,none"]],
            "chai_jax": [metrics[measure], metrics[f"{measure}_stderr"]],
        }
    record["greedy_differs"] = int((greedy != ours.greedy).sum())
    record["agrees"] = difference <= TOLERANCE and all(record[measure]["agrees"] for measure in measures)
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a dense OPT")
    parser.add_argument("--data-dir", required=True, help="holds TASK/validation.jsonl[.gz]")
    parser.add_argument("--tasks", default="sst2,rte,piqa")
    parser.add_argument("--limit", type=int, help="only the first examples of each task")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    try:
        names = chosen.tasks.split(",")
        rows = {name: load_rows(get_task(name), "validation", chosen.data_dir, chosen.limit) for name in names}
        model = load(chosen.model)
        harness = run_harness(chosen.model, rows, chosen.batch_size)
        records = {}
        for name in names:
            ours = evaluate(model, name, data_dir=chosen.data_dir, limit=chosen.limit, batch_size=chosen.batch_size)
            records[name] = agreement(name, harness, ours)
        write_json(chosen.out / "agreement.json", records)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(records))
    return 0 if all(record["agrees"] for record in records.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
