"""What few bits in the cache cost on tasks: accuracies, question by question against the dense model.

    python experiments/few_bits_tasks.py $MODEL --data-dir $DATA --tasks piqa,hellaswag:1000 \
        --compressed fb/smollm2-20 fb/smollm2-15 --storages k4v4 --seeds 0 --out runs/few-bits-tasks

The first row of a task is the dense model with a bfloat16 cache; the others are each of --storages, and each of
--compressed as it was saved (`experiments/few_bits.py --save` saves the planner's). Scored as the
lm-evaluation-harness does; differences are paired, with 95 % intervals over questions. A question shorter than a block
in progress is read from a cache that is whole: with --shots N others stand before it, and it is read from few bits.

A model takes minutes, so the answers of each are kept in OUT/rows and read back by the next call. Expected: what costs
perplexity a per cent costs accuracies nothing that so many questions could show. Writes few_bits_tasks.json, .csv, .md.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.console import console
from chai_jax.data.batches import Example, encode_all
from chai_jax.data.multiple_choice import Task
from chai_jax.data.tasks import get_task, load_rows
from chai_jax.errors import InputError
from chai_jax.evaluation.result import Result
from chai_jax.evaluation.statistics import flips, paired
from chai_jax.evaluation.tasks import evaluate
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.plans.formats import BLOCKS
from chai_jax.report.tables import Column, percent
from lab.caches import DENSE, caches
from lab.kept import kept
from lab.options import Common, Record, start
from lab.publish import publish

BLOCK = max(format.block for format in BLOCKS.values())  # tokens
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("cache", lambda row: row["cache"]),
    ("a token, % of bfloat16", lambda row: f"{100 * row['token']:.1f}"),
    ("task", lambda row: row["task"]),
    ("n", lambda row: f"{row['n']:,}"),
    ("accuracy", lambda row: percent(row["plain"]["acc"])),
    ("change, points [95 %]", lambda row: change(row, "plain")),
    ("lost, won", lambda row: "{right_to_wrong}, {wrong_to_right}".format(**row["plain"]["flips"])),
    ("by length", lambda row: percent(row["by_length"]["acc"]) if row["by_length"] else "-"),
    ("change, points [95 %]", lambda row: change(row, "by_length")),
)


def change(row: Record, which: str) -> str:
    """A paired difference in points, with its interval."""
    found = row[which]
    if found is None or row["cache"] == DENSE:
        return "-"
    low, high = found["difference_interval"]
    return f"{100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


@dataclass(frozen=True)
class TaskOptions(Common):
    tasks: str = "piqa,hellaswag:1000"
    """Tasks, with commas; `NAME:N` asks the first N questions of the validation split."""
    storages: str = ""
    """Cache formats beside the dense one, with commas."""
    compressed: tuple[str, ...] = ()
    """Folders of compressed models, each asked as it was saved."""
    shots: int = 0
    """Training questions with their answers before each question: the first ones of the split, the same for all."""

    def task(self, name: str) -> Task:
        """The task, its questions behind `shots` others."""
        task = get_task(name)
        if not self.shots:
            return task
        examples = [task.question(row).example for row in load_rows(task, "train", self.data_dir, self.shots)]
        before = "".join(f"{one.context}{one.completion}\n\n" for one in examples)
        return dataclasses.replace(task, context=before + task.context)

    @property
    def limits(self) -> dict[str, int | None]:
        """How many questions of each task; None for all."""
        found: dict[str, int | None] = {}
        for each in filter(None, (part.strip() for part in self.tasks.split(","))):
            name, _, limit = each.partition(":")
            if limit and not limit.isdecimal():
                raise InputError(f"--tasks has {each!r}; expected NAME or NAME:N: piqa,hellaswag:1000")
            found[name] = int(limit) if limit else None
        return found


def answers(name: str, model: Model, task: str, limit: int | None, options: TaskOptions) -> Result:
    """One model's answers: from the file of an earlier call, or made now and kept."""

    def ask() -> list[Record]:
        console.print(f"{Path(model.source).name} {name}, {task}", style="bold")
        return evaluate(model, options.task(task), data_dir=options.data_dir, limit=limit).samples()

    about = {"model": model.source, "cache": name, "spec": model.spec.to_json()}
    what = about | {"task": task, "limit": limit, "shots": options.shots}
    return Result.from_samples(kept(options.out, what, ask))


def compared(right: np.ndarray | None, dense: np.ndarray | None) -> Record | None:
    """An accuracy, and how it differs from the dense model's."""
    if right is None or dense is None:
        return None
    difference = paired(dense.astype(float), right.astype(float)).to_json()
    return {"acc": float(right.mean()), "flips": flips(dense, right), **difference}


def long_questions(tokenizer: Any, task: Task, limit: int | None, options: TaskOptions) -> str:
    """A sentence: how many questions are read from few bits at all."""
    rows = load_rows(get_task(task.name), "validation", options.data_dir, limit)
    longest = []
    for question in map(task.question, rows):
        examples = [Example(question.context, choice) for choice in question.choices]
        longest.append(max(len(one.tokens) for one in encode_all(tokenizer, examples, 1 << 20)))
    part = float(np.mean(np.array(longest) > BLOCK))
    return (
        f"{task.name}: a question with its longest answer has {np.median(longest):.0f} tokens in the median; "
        f"{100 * part:.0f} % have more than {BLOCK}, a block in progress."
    )


def few_bits_tasks(options: TaskOptions) -> Record:
    """All models, one after the other; of each all caches, task by task."""
    rows: list[Record] = []
    findings: list[str] = []
    for source in options.model:
        tokenizer = load(source).tokenizer
        for name, limit in options.limits.items():
            findings.append(long_questions(tokenizer, options.task(name), limit, options))
        found = {
            (name, task): (model.kv_bytes_per_token, answers(name, model, task, limit, options))
            for name, model in caches(source, options.storages, options.compressed)
            for task, limit in options.limits.items()
        }
        for task in options.limits:
            size, dense = found[DENSE, task]
            for name in dict.fromkeys(name for name, _ in found):
                nbytes, result = found[name, task]
                about = {"model": Path(source).name, "cache": name, "token": nbytes / size, "task": task, "n": result.n}
                plain = compared(result.right, dense.right)
                by_length = compared(result.right_by_length, dense.right_by_length)
                rows.append(about | {"plain": plain, "by_length": by_length})
    return publish(options, "few_bits_tasks", "Few bits in the cache: tasks", rows, COLUMNS, findings=findings)


if __name__ == "__main__":
    start(few_bits_tasks, TaskOptions, __doc__)
