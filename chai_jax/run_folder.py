"""The folder of a run: what is done stays done, what was interrupted is done again, nothing is half written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from chai_jax.errors import InputError
from chai_jax.files.atomic import check_writable, finite, new_folder, read_jsonl, write_json, write_jsonl, write_text
from chai_jax.model.model import Model
from chai_jax.processes import agreed, first_process, once

Record = dict[str, Any]


class RunFolder:
    """`config.json`, `plan.json`, `sensitivity.json`, `metrics.jsonl`, `stages/`, `results.json`, `model/`, `report/`.

    A stage's folder (model, record, predictions) appears by one rename when the stage is done; a run that was killed is
    opened again with the same configuration, skips the stages it finds and goes on within the one it was in.
    """

    def __init__(self, path: Path, config: Record):
        """Look at `path`, writing nothing.

        Raises:
            InputError: `path` cannot be written, holds something that is no run, or a run with another configuration.
        """
        self.path, self.config = path, config
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; expected a folder for the run: choose another --out")
        if path.is_dir() and any(path.iterdir()):
            self._check_same(config)
        check_writable(path)

    def open(self) -> None:
        """Make the folder, once it is known that the run can start.

        Raises:
            InputError: another host's process does not see it.
        """
        once(lambda: write_json(self.path / "config.json", self.config))
        if not (self.path / "config.json").is_file():
            raise InputError(
                f"process {jax.process_index()} does not see {self.path}; expected a folder that all hosts share "
                "(NFS, a mounted bucket): choose another --out"
            )

    def _check_same(self, config: Record) -> None:
        try:
            before = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise InputError(
                f"{self.path} holds something that is not a run; expected a new or empty folder: choose another --out"
            ) from None
        wanted = json.loads(json.dumps(config))
        for name in sorted({*before, *wanted}):
            if before.get(name) != wanted.get(name):
                raise InputError(
                    f"{self.path} holds a run with {name} = {before.get(name)!r}, not {wanted.get(name)!r}; "
                    "repeat its command to resume it, or choose another --out"
                )

    def stage_path(self, index: int, name: str) -> Path:
        return self.path / "stages" / f"{index}-{name}"

    def checkpoints(self, index: int, name: str) -> Path:
        """Where a stage under way keeps its state."""
        return self.path / "stages" / f"{index}-{name}.partial" / "checkpoints"

    def clear_partial(self, index: int, name: str) -> None:
        """Remove what a stage kept while it was under way."""
        if first_process():
            shutil.rmtree(self.checkpoints(index, name).parent, ignore_errors=True)

    def finished(self, index: int, name: str) -> bool:
        """Whether this stage was completed by an earlier, interrupted run."""
        return agreed((self.stage_path(index, name) / "record.json").is_file())

    def finish(self, index: int, name: str, model: Model, record: Record, predictions: list[Record]) -> None:
        """Write a completed stage: its model, its record, and one JSON line per evaluated example."""

        def write() -> None:
            with new_folder(self.stage_path(index, name)) as folder:
                model.save(folder / "model")
                write_jsonl(folder / "predictions.jsonl", predictions)
                write_json(folder / "record.json", finite(record))

        once(write)

    def record(self, index: int, name: str) -> Record:
        return json.loads((self.stage_path(index, name) / "record.json").read_text(encoding="utf-8"))

    def predictions(self, index: int, name: str) -> list[Record]:
        return read_jsonl(self.stage_path(index, name) / "predictions.jsonl")

    def logger(self, stage: str) -> Callable[[Record], None]:
        """Append records of `stage` to metrics.jsonl, each of its steps once; in all processes but the first, nothing.

        The first record says where the stage goes on: what an interrupted attempt left from that step on is dropped.
        """
        if not first_process():
            return lambda record: None
        path = self.path / "metrics.jsonl"
        begun = False

        def log(record: Record) -> None:
            nonlocal begun
            if not begun:
                write_text(path, "".join(line for line in _lines(path) if not _is_from(line, stage, record["step"])))
                begun = True
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run_stage": stage, **record}) + "\n")

        return log


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _is_from(line: str, stage: str, step: int) -> bool:
    """Whether a line is of this stage and step or a later one, or was cut short by a kill."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return True
    return record.get("run_stage") == stage and record.get("step", step) >= step
