"""A task of a person's own: a YAML file that says how rows of JSON lines become questions (docs/tasks.md)."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from chai_jax.data.multiple_choice import MOST_CHOICES, NORMALISE, Origin, Task, check_template, columns_of
from chai_jax.errors import InputError
from chai_jax.inputs.fields import brief, parse_as
from chai_jax.inputs.paths import user_path
from chai_jax.inputs.plain_yaml import parse_yaml
from chai_jax.inputs.reading import UTF8, read_bytes, reason, shown

ENDINGS = (".yaml", ".yml")  # what tells a task file from the name of a task
MOST_BYTES = 2**16


@dataclass(frozen=True)
class TaskFile:
    """The keys of a task file, as `Task` has them; `train` and `validation` name files of rows."""

    context: str
    choices: str | tuple[str, ...]
    gold: str = "label"
    delimiter: str = " "
    normalise: Annotated[str, NORMALISE] = "none"
    train: str | None = None
    validation: str | None = None
    name: str | None = None

    def check(self, where: str) -> None:
        """Raise InputError where all rows would ask the same, or what is written is no template."""
        listed = () if isinstance(self.choices, str) else self.choices
        if (listed and not 2 <= len(listed) <= MOST_CHOICES) or not self.choices:
            raise InputError(
                f"{where} has choices {brief(self.choices)}; expected 2 to {MOST_CHOICES} templates, or the name of a "
                "column that holds a list"
            )
        for what, template in (("context", self.context), *(("choices", one) for one in listed), ("gold", self.gold)):
            check_template(template, f"{where}: {what}")
        if isinstance(self.choices, str) and "{{" in self.choices:
            raise InputError(
                f"{where} has choices {brief(self.choices)}; expected the bare name of a column that holds a list, or "
                "a list of templates"
            )
        if not columns_of(self.context) and (self.context or not any(map(columns_of, listed or ["{{list}}"]))):
            raise InputError(
                f"{where} has context {brief(self.context)}, which names no column; expected {{{{column}}}} in it (or "
                "'' where the choices name one)"
            )
        if not self.gold:
            raise InputError(f"{where} has an empty gold; expected a column with the number of the right choice")
        if self.train is None and self.validation is None:
            raise InputError(f"{where} names no rows; expected train: FILE.jsonl, validation: FILE.jsonl, or both")


def read_task(path: str | Path) -> Task:
    """The task that a file describes.

    Raises:
        InputError: no such file, no YAML, a key that is unknown, missing or wrong.
    """
    path = user_path(path)
    where = shown(path)
    try:
        content = read_bytes(path, MOST_BYTES)
        fields = parse_yaml(content.decode(UTF8))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {where} ({reason(error)}); expected a task file (docs/tasks.md)") from None
    except ValueError as error:
        raise InputError(f"{where} cannot be read ({error}); expected YAML as docs/tasks.md has it: mend it") from None
    found: TaskFile = parse_as(TaskFile, fields, where)
    found.check(where)
    name = path.stem if found.name is None else found.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise InputError(f"{where} has the name {brief(name)}; expected letters, digits, _, . and -: add name: NAME")
    splits = {"train": found.train, "validation": found.validation}
    return Task(
        name=name,
        context=found.context,
        choices=found.choices,
        gold=found.gold,
        delimiter=found.delimiter,
        normalise=found.normalise,
        origin=Origin(
            path,
            hashlib.sha256(content).hexdigest(),
            {split: file for split, file in splits.items() if file is not None},
        ),
    )


def rows_file(origin: Origin, split: str, data_dir: Path | None) -> Path:
    """The file of a split: in `data_dir` if it is there, or else beside the task file.

    Raises:
        InputError: the task file names none, or it is in neither place.
    """
    if split not in origin.splits:
        raise InputError(f"{shown(origin.path)} names no {split} rows; expected a line such as {split}: rows.jsonl")
    name = user_path(origin.splits[split])
    places = [folder / name for folder in (data_dir, origin.path.parent) if folder is not None]
    for path in places:
        if path.is_file():
            return path
    looked = " and ".join(dict.fromkeys(map(shown, places)))
    raise InputError(
        f"{looked} is missing; expected the {split} rows that {shown(origin.path)} names: check the name, or --data-dir"
    )
