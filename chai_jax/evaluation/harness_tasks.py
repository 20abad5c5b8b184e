"""The lm-evaluation-harness's own tasks on local rows: what they read, and task files that make them read it."""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from chai_jax.data.multiple_choice import Row
from chai_jax.data.tasks import get_task, load_rows
from chai_jax.data.text import pages, read_text_file
from chai_jax.errors import InputError

# The harness's own definitions of what can be run on local rows.
HARNESS_FILES = {
    "sst2": "glue/sst2/default.yaml",
    "rte": "glue/rte/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
WIKITEXT = Path("wikitext2/test.raw.txt")  # in a data folder, gzipped or not


def local_rows(name: str, data_dir: Path, limit: int | None = None, few_shot: bool = False) -> dict[str, list[Row]]:
    """By split, what the harness's task `name` reads, from a data folder.

    Args:
        limit: only the first rows (documents of wikitext) of what is scored.
        few_shot: whether the training rows, of which examples are taken, are wanted too.

    Raises:
        InputError: an unknown task, or files that are missing or damaged.
    """
    if name != "wikitext":
        task = get_task(name)
        training = {"training": load_rows(task, "train", data_dir)} if few_shot else {}
        return {"validation": load_rows(task, "validation", data_dir, limit), **training}
    plain, zipped = data_dir / WIKITEXT, data_dir / f"{WIKITEXT}.gz"
    if not plain.is_file() and not zipped.is_file():
        raise InputError(f"{plain}[.gz] is missing; expected WikiText-2's raw test text there: check --data-dir")
    text = read_text_file(plain if plain.is_file() else zipped)
    return {"test": [{"page": page} for page in pages(text)[:limit]]}


def write_tasks(folder: Path, rows: Mapping[str, Mapping[str, Sequence[Row]]]) -> None:
    """Write the harness's own tasks into `folder`, changed in nothing but that they read these rows.

    Given to the harness as `include_path`, they take the place of its tasks of the same names: no network is needed.

    Args:
        folder: holds the task files, the rows, and the harness's copies of them.
        rows: by task name and split (training, validation, test), each with its task's columns (see `local_rows`).

    Raises:
        InputError: an unknown task, or the harness is not installed.
    """
    harness = find_spec("lm_eval")
    if harness is None or harness.origin is None:
        raise InputError("the lm-evaluation-harness is not there: pip install 'chai_jax[eval]'")
    built_in = Path(harness.origin).parent / "tasks"
    for name, splits in rows.items():
        if name not in HARNESS_FILES:
            raise InputError(
                f"the task {name!r} has no counterpart in the harness; expected one of {', '.join(HARNESS_FILES)}"
            )
        files = {split: (folder / f"{name}_{split}.jsonl").absolute() for split in splits}
        for split, path in files.items():
            path.write_text("".join(json.dumps(row) + "\n" for row in splits[split]), encoding="utf-8")
        local = {
            "include": str(built_in / HARNESS_FILES[name]),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(path) for split, path in files.items()},
                "cache_dir": str((folder / "cache").absolute()),
            },
            **{f"{split}_split": split if split in splits else None for split in ("training", "validation", "test")},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(local), encoding="utf-8")  # JSON is YAML
