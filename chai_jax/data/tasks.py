"""The tasks that are built in, and the rows of all: SST-2, RTE, PIQA, HellaSwag as the harness asks them, and the toy.

Prompts follow lm-evaluation-harness 0.4.13 (`lm_eval/tasks/{glue/sst2,glue/rte,piqa,hellaswag}`): zero-shot, and an
answer begins with a space.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from chai_jax.data import hellaswag
from chai_jax.data.multiple_choice import Row, Task
from chai_jax.data.task_files import ENDINGS, read_task, rows_file
from chai_jax.data.toy import TOY_ANSWERS, TOY_PROMPT, toy_rows
from chai_jax.errors import InputError
from chai_jax.inputs.reading import open_utf8, parse_json, reason, shown

SPLITS = ("train", "validation")  # the test splits of GLUE have no labels

TASKS = {
    task.name: task
    for task in (
        Task(
            "sst2",
            "{{sentence}}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            ("negative", "positive"),
            hub=("nyu-mll/glue", "sst2"),
        ),
        Task(
            "rte",
            "{{sentence1}}\nQuestion: {{sentence2}} True or False?\nAnswer:",
            ("True", "False"),
            hub=("nyu-mll/glue", "rte"),
        ),
        Task(
            "piqa",
            "Question: {{goal}}\nAnswer:",
            ("{{sol1}}", "{{sol2}}"),
            normalise="characters",
            hub=("baber/piqa",),
        ),
        Task(
            "hellaswag",
            "{{query}}",
            "choices",
            normalise="characters",
            hub=("Rowan/hellaswag",),
            prepare=hellaswag.prepare,
        ),
        Task("toy", TOY_PROMPT, TOY_ANSWERS, generate=toy_rows),
    )
}


def get_task(name: str) -> Task:
    """The task of this name, or the one that a file NAME.yaml describes.

    Raises:
        InputError: there is none, or what reading the file raises.
    """
    if name.endswith(ENDINGS):
        return read_task(name)
    if name not in TASKS:
        raise InputError(f"task {name!r:.80} is unknown; expected one of {', '.join(TASKS)}, or a file: NAME.yaml")
    return TASKS[name]


def get_tasks(option: str, names: str) -> list[Task]:
    """The tasks that an option names, with commas between them.

    Raises:
        InputError: there is none, two have one name, or as `get_task`.
    """
    tasks = [get_task(name.strip()) for name in names.split(",") if name.strip()]
    if not tasks:
        raise InputError(f"{option} is {names!r}; expected {', '.join(TASKS)}, or files NAME.yaml; several with commas")
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise InputError(f"{option} has two tasks called {task.name}; expected each once: add name: NAME to a file")
    return tasks


def load_rows(task: Task, split: str, data_dir: str | Path | None = None, limit: int | None = None) -> list[Row]:
    """Rows of a split: from `data_dir/TASK/SPLIT.jsonl[.gz]` or, without a folder, from the Hugging Face hub.

    The toy's are made, with or without a folder. Those of a task file are in the file that it names, in `data_dir` or
    beside it. A `limit` takes the first rows.

    Raises:
        InputError: no such split or file, bad JSON, a missing column, a label out of range, no rows, no way to the hub.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 example")
    if task.generate is not None:
        return task.generate(split)[:limit]
    folder = None if data_dir is None else Path(data_dir)
    if folder is None and task.origin is None:
        where = f"{'/'.join(task.hub)} {split}"
        rows = [(f"{where}, row {number}", row) for number, row in enumerate(_from_hub(task, split), 1)]
    else:
        path = _local_file(folder, task, split)
        where, rows = shown(path), _from_file(path)
    if not rows:
        raise InputError(f"{where} holds no examples; expected at least one: check the file")
    return [task.checked(row, place) for place, row in rows[:limit]]


def _local_file(data_dir: Path | None, task: Task, split: str) -> Path:
    if task.origin is not None:
        return rows_file(task.origin, split, data_dir)
    assert data_dir is not None
    names = [data_dir / task.name / f"{split}.jsonl{ending}" for ending in ("", ".gz")]
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
