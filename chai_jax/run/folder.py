"""The folder of a run: what is done stays done, what was interrupted is done again, nothing is half written."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from chai_jax.errors import InputError
from chai_jax.files.atomic import check_writable, finite, new_folder, read_jsonl, write_json, write_jsonl, write_text
from chai_jax.files.lock import LOCK, Busy, holder, locked
from chai_jax.files.store import save
from chai_jax.inputs.reading import Record, parse_json, read_json, reason, shown
from chai_jax.machine.processes import agreed, first_process, once
from chai_jax.model.model import Model


class RunFolder:
    """`config.json`, `plan.json`, `sensitivity.json`, `metrics.jsonl`, `stages/`, `results.json`, `model/`, `report/`.

    A stage's folder (model, record, predictions) appears by one rename when the stage is done. A run that was killed is
    started again with the same configuration: it skips the stages that are done and goes on within the one it was in.
    """

    def __init__(self, path: Path, config: Record):
        """Look at `path`, writing nothing.

        Raises:
            InputError: `path` cannot be written, holds something that is no run, a run with another configuration, or
                one that is under way.
        """
        self.path, self.config = path, config
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; expected a folder for the run: choose another --out")
        self._check_same()
        check_writable(path)
        once(lambda: self._refuse_second(holder(path / LOCK)))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, once it is known that the run can start, and keep other runs out of it.

        Of several processes the first one holds the lock. What a killed run left half written is removed.

        Raises:
            InputError: another run is under way there, or came first; or another host's process does not see it.
        """

        def begin() -> None:
            try:
                lock.enter_context(locked(self.path / LOCK))
            except Busy as busy:
                self._refuse_second(str(busy))
            self._check_same()
            write_json(self.path / "config.json", self.config)

        with ExitStack() as lock:
            once(begin)
            if not (self.path / "config.json").is_file():
                raise InputError(
                    f"process {jax.process_index()} does not see {self.path}; expected a folder that all hosts share "
                    "(NFS, a mounted bucket): choose another --out"
                )
            yield

    def _refuse_second(self, first: str | None) -> None:
        if first is not None:
            raise InputError(
                f"{shown(self.path)} has a run under way ({first}); expected one at a time: wait for it, stop it, or "
                f"choose another --out (if its machine is gone for good: delete {LOCK} there)"
            )

    def _check_same(self) -> None:
        """Refuse a folder of something else; a run that was killed at once may have left no more than its lock."""
        file, names = self.path / "config.json", [path.name for path in self.path.glob("*")]
        if all(name == LOCK or name.startswith(f".{file.name}.") for name in names):
            return
        if file.name not in names:
            raise InputError(
                f"{self.path} holds something that is not a run; expected a new or empty folder: choose another --out"
            )
        before, wanted = read_json(file, "the settings of a run"), json.loads(json.dumps(self.config))
        for name in sorted({*before, *wanted}):
            if before.get(name) != wanted.get(name):
                raise InputError(
                    f"{shown(self.path)} holds a run with {name} = {shown(repr(before.get(name)))}, not "
                    f"{shown(repr(wanted.get(name)))}; repeat its command to resume it, or choose another --out"
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
                save(model, folder / "model")
                write_jsonl(folder / "predictions.jsonl", predictions)
                write_json(folder / "record.json", finite(record))

        once(write)

    def record(self, index: int, name: str) -> Record:
        return read_json(self.stage_path(index, name) / "record.json", "the record of a stage")

    def predictions(self, index: int, name: str) -> list[Record]:
        path = self.stage_path(index, name) / "predictions.jsonl"
        try:
            return read_jsonl(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read {shown(path)} ({reason(error)}); expected one JSON object a line: delete the folder of "
                "this stage and repeat the command"
            ) from None

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
                lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
                kept = (line for line in lines if not _is_from(line, stage, record["step"]))
                write_text(path, b"".join(kept).decode())
                begun = True
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run_stage": stage, **record}) + "\n")

        return log


def _is_from(line: bytes, stage: str, step: int) -> bool:
    """Whether a line is of this stage and step or a later one, or is none of ours: a kill may have cut it short."""
    try:
        record = parse_json(line.decode())
        return record["run_stage"] == stage and record["step"] >= step
    except (ValueError, KeyError, TypeError):
        return True
