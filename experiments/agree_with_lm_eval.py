"""Do our scores agree with the lm-evaluation-harness, example by example?

    python experiments/agree_with_lm_eval.py $MODEL --data-dir $DATA --out runs/agreement

Needs torch and lm-eval[hf]. The harness's own tasks (sst2, rte, piqa, hellaswag, wikitext) read the rows of $DATA.

- dense: the harness runs the dense $MODEL with transformers in float32 on the CPU. Beside it `evaluate` for the
  choices, and `chai-jax lm-eval`'s model for wikitext, whose documents are scored whole in windows.
- compressed: `evaluate` beside `chai-jax lm-eval`'s model, both on $MODEL with half of the heads of every layer
  clustered and quantized by tier (calibrated on training rows of the first task, not tuned), or on --compressed FOLDER.

Expected, dense: no log-likelihood of a choice further apart than 1e-3 nats, equal accuracies, equal standard errors,
the same predictions (but where the best two choices lie within 1e-3 nats, which are listed), and word perplexities that
agree to one part in 100,000. Compressed: no difference at all. Writes agreement.json; exits with 1 where something
disagrees. The last line on stdout is the record as JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.analyse.planner import plan
from chai_jax.analyse.probe import probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.data.batches import encode
from chai_jax.data.tasks import get_task, held_out, load_rows
from chai_jax.errors import InputError
from chai_jax.evaluation.harness_tasks import local_rows, write_tasks
from chai_jax.evaluation.tasks import Result, evaluate
from chai_jax.files.atomic import write_json
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.run.environment import versions, where_computed

TOLERANCE = 1e-3  # nats, of a choice, between two implementations
RELATIVE = 1e-5  # of a word perplexity
CALIBRATION = 64  # training prompts

Record = dict[str, Any]
Rows = dict[str, dict[str, list[Any]]]


def run_harness(model: Any, rows: Rows, **options: Any) -> Record:
    """Results and samples of the lm-evaluation-harness on rows by task and split."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), rows)
        return lm_eval.simple_evaluate(
            model=model,
            tasks=list(rows),
            task_manager=TaskManager(include_path=folder, include_defaults=False),  # reading all takes 8 s
            log_samples=True,
            bootstrap_iters=1,  # 0 would turn standard errors off; those of means are closed forms
            **options,
        )


def compress(model: Model, task_name: str, data_dir: Path) -> Model:
    """Half of the heads of every layer clustered, keys and values shared, and all of it quantized by tier."""
    task = get_task(task_name)
    kept, _ = held_out(load_rows(task, "train", data_dir), CALIBRATION)
    examples = [task.question(row).example for row in kept]
    longest = model.config.max_positions - 1
    seen = probe(model, [encode(model.tokenizer, one.context, one.completion, longest).tokens for one in examples])
    chosen = plan(model, seen, share="qkv", layers=1.0, clusters=0.5, sensitivity="attention")
    return quantize(cluster(model, chosen), chosen)


def compare(theirs: np.ndarray, ours: np.ndarray, norms: np.ndarray, tolerance: float) -> Record:
    """Two sets of log-likelihoods [examples, choices], divided by `norms` before the best one is chosen.

    A margin is narrow if `tolerance` nats on one choice could turn it.
    """
    theirs, ours = theirs / norms, ours / norms
    ranked = np.sort(theirs, axis=1)
    narrow = ranked[:, -1] - ranked[:, -2] < tolerance / norms.min(axis=1)
    different = theirs.argmax(1) != ours.argmax(1)
    return {
        "different_predictions": np.flatnonzero(different).tolist(),
        "narrow_margins": np.flatnonzero(narrow).tolist(),
        "agrees": not (different & ~narrow).any(),
    }


def samples(harness: Record, name: str) -> list[Record]:
    """A task's samples in the order of its rows."""
    return sorted(harness["samples"][name], key=lambda sample: sample["doc_id"])


def choices(name: str, harness: Record, ours: Result, tolerance: float) -> Record:
    """One task's record: the largest difference, the predictions, and the reported figures side by side."""
    answers = np.array([list(sample["filtered_resps"]) for sample in samples(harness, name)])
    theirs, greedy = answers[..., 0], answers[..., 1].astype(bool)
    reported, metrics = harness["results"][name], ours.metrics()
    difference = float(np.abs(theirs - ours.loglikelihoods).max())
    record: Record = {"n": len(theirs), "max_difference_nats": difference}
    measures = {"acc": np.ones_like(theirs)}
    if ours.lengths is not None:
        measures["acc_norm"] = ours.lengths
    for measure, norms in measures.items():
        record[measure] = {
            **compare(theirs, ours.loglikelihoods, norms, tolerance),
            "harness": [reported[f"{measure},none"], reported[f"{measure}_stderr,none"]],
            "chai_jax": [metrics[measure], metrics[f"{measure}_stderr"]],
        }
    record["greedy_differs"] = int((greedy != ours.greedy).sum())
    record["agrees"] = difference <= tolerance and all(record[measure]["agrees"] for measure in measures)
    return record


def pages(theirs: Record, ours: Record) -> Record:
    """Wikitext's record, of two runs of the harness: log-likelihoods of whole documents, and perplexities."""
    both = [np.array([one["filtered_resps"][0] for one in samples(run, "wikitext")]) for run in (theirs, ours)]
    record: Record = {
        "n": len(both[0]),
        "nats": float(-both[0].sum()),
        "max_difference_nats": float(np.abs(both[0] - both[1]).max()),
        "max_relative_difference": float(np.abs(both[1] / both[0] - 1).max()),
    }
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        found = [run["results"]["wikitext"][f"{name},none"] for run in (theirs, ours)]
        record[name] = dict(zip(("harness", "chai_jax"), found, strict=True))
    words = record["word_perplexity"]
    record["agrees"] = abs(words["chai_jax"] / words["harness"] - 1) <= RELATIVE
    return record


def agreement(chosen: argparse.Namespace) -> Record:
    """Both comparisons, by model and task."""
    from chai_jax.evaluation.lm_eval import LanguageModel  # says so where the harness is not there; --help needs none

    names = chosen.tasks.split(",")
    limits = {name: chosen.pages if name == "wikitext" else chosen.limit for name in names}
    rows = {name: local_rows(name, chosen.data_dir, limits[name]) for name in names}
    questions = {name: splits for name, splits in rows.items() if name != "wikitext"}
    model = load(chosen.model)
    if not questions:
        small = None
    elif chosen.compressed:
        small = load(chosen.compressed)
    else:
        small = compress(model, next(iter(questions)), chosen.data_dir)

    def ours(model: Model, name: str) -> Result:
        return evaluate(model, name, data_dir=chosen.data_dir, limit=chosen.limit, batch_size=chosen.batch_size)

    torch = {"model_args": {"pretrained": chosen.model, "dtype": "float32"}, "device": "cpu"}
    theirs = run_harness("hf", rows, batch_size=chosen.batch_size, **torch)
    found: Record = {"dense": {name: choices(name, theirs, ours(model, name), TOLERANCE) for name in questions}}
    if "wikitext" in rows:
        own = run_harness(LanguageModel(model, chosen.batch_size), {"wikitext": rows["wikitext"]})
        found["dense"]["wikitext"] = pages(theirs, own)
    if small is not None:
        own = run_harness(LanguageModel(small, chosen.batch_size), questions)
        found["compressed"] = {name: choices(name, own, ours(small, name), 0.0) for name in questions}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a dense model")
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="holds TASK/validation.jsonl[.gz], wikitext2/, ..."
    )
    parser.add_argument("--tasks", default="sst2,rte,piqa,hellaswag,wikitext")
    parser.add_argument("--compressed", help="folder of a compressed model (default: one made from MODEL)")
    parser.add_argument("--limit", type=int, help="only the first examples of each task but wikitext")
    parser.add_argument("--pages", type=int, help="only the first documents of wikitext (of 62)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/agreement"))
    chosen = parser.parse_args(arguments)
    try:
        records = agreement(chosen)
        write_json(chosen.out / "agreement.json", {**records, "versions": versions(), **where_computed()})
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(records))
    return 0 if all(record["agrees"] for tasks in records.values() for record in tasks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
