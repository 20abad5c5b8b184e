"""SST-2, RTE and PIQA as the lm-evaluation-harness asks them, and the toy: rows, prompts and choices.

Prompts follow lm-evaluation-harness 0.4.13 (`lm_eval/tasks/{glue/sst2,glue/rte,piqa}`): zero-shot, and an answer begins
with a space.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.data.batches import Example
from chai_jax.data.tokens import check_characters
from chai_jax.data.toy import TOY_ANSWERS, TOY_PROMPT, toy_rows
from chai_jax.errors import InputError
from chai_jax.inputs.reading import open_utf8, parse_json, reason, shown

Row = dict[str, Any]
SPLITS = ("train", "validation")  # the test splits of GLUE have no labels


@dataclass(frozen=True)
class MultipleChoice:
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
        labels: how many labels there are; a row's `label` counts from 0.
        hub: data set and configuration on the Hugging Face hub; empty for a task that is not there.
        normalised: whether the harness reports acc_norm (log-likelihood per character) too.
        generate: makes the rows of a split, for a task that needs no files.
    """

    name: str
    columns: tuple[str, ...]
    context: Callable[[Row], str]
    choices: Callable[[Row], tuple[str, ...]]
    labels: int = 2
    hub: tuple[str, ...] = ()
    normalised: bool = False
    generate: Callable[[str], list[Row]] | None = None

    def question(self, row: Row) -> MultipleChoice:
        """The question a row asks."""
        return MultipleChoice(self.context(row), tuple(f" {choice}" for choice in self.choices(row)), row["label"])


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
        Task(
            "toy",
            ("sentence",),
            lambda row: TOY_PROMPT.format(**row),
            lambda row: TOY_ANSWERS,
            generate=toy_rows,
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

    The toy's are made, with or without a folder. A `limit` takes the first rows.

    Raises:
        InputError: no such split or file, bad JSON, a missing column, a label out of range, no rows, no way to the hub.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 example")
    if task.generate is not None:
        return task.generate(split)[:limit]
    if data_dir is None:
        where = f"{'/'.join(task.hub)} {split}"
        rows = [(f"{where}, row {number}", row) for number, row in enumerate(_from_hub(task, split), 1)]
    else:
        path = _local_file(Path(data_dir), task.name, split)
        where, rows = shown(path), _from_file(path)
    if not rows:
        raise InputError(f"{where} holds no examples; expected at least one: check the file")
    for place, row in rows[:limit]:
        _check_row(task, row, place)
    return [row for _, row in rows[:limit]]


def _local_file(data_dir: Path, task: str, split: str) -> Path:
    names = [data_dir / task / f"{split}.jsonl{ending}" for ending in ("", ".gz")]
    for path in names:
        if path.is_file():
            return path
    raise InputError(f"{shown(names[0])}[.gz] is missing; expected the task's rows there: check --data-dir")


def _from_file(path: Path) -> list[tuple[str, Row]]:
    """(file:line, row) of every line that is not blank."""
    # A plain reader: `datasets` reports a bad line as an Arrow error without its number, and fills a cache with copies.
    with open_utf8(path) as file:
        lines = [(f"{shown(path)}:{number}", line) for number, line in enumerate(file, 1)]
    return [(place, _parse(line, place)) for place, line in lines if line.strip()]


def _parse(line: str, where: str) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({reason(error)}); expected one object a line: mend the line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} holds a {type(row).__name__}; expected a JSON object: mend the line")
    return row


def _from_hub(task: Task, split: str) -> list[Row]:
    import datasets  # takes a second, and most runs read a folder

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
            raise InputError(f"{where} has {column} = {row[column]!r:.80}; expected a string")
        check_characters(row[column], f"{where}: {column}")
    if type(row["label"]) is not int or not 0 <= row["label"] < task.labels:
        raise InputError(f"{where} has label {row['label']!r:.80}; expected an integer from 0 to {task.labels - 1}")


def held_out(rows: Sequence[Row], count: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Split training rows into (held out, rest); the held-out ones serve calibration and choices.

    At most half of the rows are held out. Other rows with a text that is held out (SST-2 has some phrases twice) are
    dropped, so that no choice is judged on a text that was trained on.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    count = min(count, len(rows) // 2)
    held = [rows[at] for at in order[:count]]
    texts = {_texts(row) for row in held}
    return held, [rows[at] for at in np.sort(order[count:]) if _texts(rows[at]) not in texts]


def _texts(row: Row) -> tuple[str, ...]:
    return tuple(value for value in row.values() if isinstance(value, str))
