"""SST-2, RTE and PIQA as the lm-evaluation-harness asks them: rows, prompts and choices.

Prompts follow lm-evaluation-harness 0.4.13 (`lm_eval/tasks/{glue/sst2,glue/rte,piqa}`), zero-shot, target delimiter " ".
"""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.data.batches import Example
from chai_jax.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One question: a context, the possible completions (each with its leading space), the right one's index."""

    context: str
    choices: tuple[str, ...]
    label: int

    @property
    def example(self) -> Example:
        """The context with the right answer, to train on."""
        return Example(self.context, self.choices[self.label])


@dataclass(frozen=True)
class Task:
    """A multiple-choice task.

    Attributes:
        columns: text columns a row must have (beside `label`).
        context: the prompt of a row.
        choices: the answers of a row, without leading space; as many as there are labels.
        hub: data set and configuration on the Hugging Face hub; empty for a task that is not there.
        normalised: whether the harness reports acc_norm (log-likelihood per character) too.
    """

    name: str
    columns: tuple[str, ...]
    context: Callable[[Row], str]
    choices: Callable[[Row], tuple[str, ...]]
    labels: int = 2
    hub: tuple[str, ...] = ()
    normalised: bool = False

    def request(self, row: Row) -> Request:
        """The question a row asks."""
        return Request(self.context(row), tuple(f" {choice}" for choice in self.choices(row)), row["label"])


TASKS = {
    task.name: task
    for task in (
        Task(
            "sst2",
            ("sentence",),
            lambda row: f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            lambda row: ("negative", "positive"),
            hub=("nyu-mll/glue", "sst2"),
        ),
        Task(
            "rte",
            ("sentence1", "sentence2"),
            lambda row: f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:",
            lambda row: ("True", "False"),
            hub=("nyu-mll/glue", "rte"),
        ),
        Task(
            "piqa",
            ("goal", "sol1", "sol2"),
            lambda row: f"Question: {row['goal']}\nAnswer:",
            lambda row: (row["sol1"], row["sol2"]),
            hub=("baber/piqa",),
            normalised=True,
        ),
    )
}


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        InputError: there is none.
    """
    if name not in TASKS:
        raise InputError(f"task {name!r} is unknown; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def load_rows(task: Task, split: str, data_dir: str | Path | None = None, limit: int | None = None) -> list[Row]:
    """Rows of a split: from `data_dir/TASK/SPLIT.jsonl[.gz]` or, without a folder, from the Hugging Face hub.

    Raises:
        InputError: no such file, bad JSON, a missing column, a label out of range, no rows, or no way to the hub.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 example")
    if data_dir is None:
        where, rows = f"{'/'.join(task.hub)} {split}", _from_hub(task, split)
    else:
        path = _local_file(Path(data_dir), task.name, split)
        where, rows = str(path), _from_file(path)
    rows = rows[:limit]
    if not rows:
        raise InputError(f"{where} holds no examples; expected at least one: check the file")
    for number, row in enumerate(rows, 1):
        _check_row(task, row, f"{where}, row {number}")
    return rows


def _local_file(data_dir: Path, task: str, split: str) -> Path:
    names = [data_dir / task / f"{split}.jsonl{ending}" for ending in ("", ".gz")]
    for path in names:
        if path.is_file():
            return path
    raise InputError(f"{names[0]}[.gz] is missing; expected the task's rows there: check --data-dir")


def _from_file(path: Path) -> list[Row]:
    # A plain reader: `datasets` would report a bad line as an Arrow error without its number, and copy the file to a cache.
    rows = []
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    try:
        with opened as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_parse(line, f"{path}:{number}"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}); expected UTF-8 JSON lines: restore the file") from None
    return rows


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}); expected one object a line: mend the line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} holds a {type(row).__name__}; expected a JSON object: mend the line")
    return row


def _from_hub(task: Task, split: str) -> list[Row]:
    if not task.hub:
        raise InputError(f"task {task.name} is not on the hub; give its rows with --data-dir")
    import datasets

    try:
        return list(datasets.load_dataset(*task.hub, split=split))
    # Offline, refused, not found, changed: datasets raises a different family for each.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"cannot fetch {'/'.join(task.hub)} from the hub ({reason}); "
            f"give a folder holding {task.name}/{split}.jsonl with --data-dir"
        ) from None


def _check_row(task: Task, row: Row, where: str) -> None:
    for column in (*task.columns, "label"):
        if column not in row:
            raise InputError(f"{where} has no column {column!r}; expected {', '.join(task.columns)} and label")
    for column in task.columns:
        if not isinstance(row[column], str):
            raise InputError(f"{where} has {column} = {row[column]!r}; expected a string")
    if type(row["label"]) is not int or not 0 <= row["label"] < task.labels:
        raise InputError(f"{where} has label {row['label']!r}; expected an integer from 0 to {task.labels - 1}")


def held_out(rows: Sequence[Row], count: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Split training rows into (held out, rest), disjoint; the held-out ones serve calibration and choices.

    At most half of the rows are held out.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    count = min(count, len(rows) // 2)
    chosen = set(order[:count].tolist())
    return [rows[at] for at in order[:count]], [row for at, row in enumerate(rows) if at not in chosen]
