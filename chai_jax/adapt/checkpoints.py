"""The state of a training stage on disk, so that a stage that was killed ends with the very same bits.

Orbax writes in the background and renames what is whole, and keeps the newest. Beside the state (masters, optimizer,
counters; frozen leaves are the input model's) lies what it belongs to and a checksum of every array. A checkpoint that
cannot be read, or does not have its checksums, is passed over for the one before it.
"""

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from chai_jax.adapt.fingerprint import checksums, first_difference, named
from chai_jax.config import Checkpoints
from chai_jax.console import console
from chai_jax.errors import InputError, Stopped
from chai_jax.inputs.reading import Record
from chai_jax.machine.processes import anywhere, first_process
from chai_jax.stopping import listening, terminated

NO_SPACE = "No space left on device"


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Orbax reports a failure by an exception, and beside it by tracebacks on stderr, which this keeps back.

    They come from its logger and, where one array of a checkpoint cannot be read, from the reads still under way.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("absl")
    level = logger.level

    def keep_back(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
            hook(unraisable)

    sys.unraisablehook = keep_back
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)


class Keeper:
    """Saves a stage's state when it is due, and hands back the newest that can be read.

    Entered, it also listens for SIGTERM: the update under way ends, its state is saved, and `Stopped` is raised.
    """

    def __init__(self, where: Checkpoints | Path | str, fingerprint: Record):
        """Look at the folder, making it where there is none.

        Raises:
            InputError: the folder cannot be written.
        """
        self.where = where = where if isinstance(where, Checkpoints) else Checkpoints(where)
        self.fingerprint, self.folder = fingerprint, Path(where.path).absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(where.keep),
            cleanup_tmp_directories=True,
            save_root_metadata=False,
        )
        try:
            with quiet_orbax():
                self.manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise InputError(f"cannot keep checkpoints in {self.folder} ({error.strerror or error})") from error
        self.stack = ExitStack()
        self.last_step, self.last_time = 0, time.monotonic()

    def __enter__(self) -> "Keeper":
        self.stack.enter_context(listening())
        self.stack.enter_context(quiet_orbax())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()
        try:
            self.manager.close()
        except Exception as failure:
            if error is None:
                raise self._refusal(failure) from failure

    @property
    def empty(self) -> bool:
        """Whether there is no checkpoint."""
        return not self.manager.all_steps()

    def restore(self, like: Any) -> tuple[int, Any]:
        """The newest whole checkpoint: the updates it has seen, and its state; (0, None) where there is none.

        Args:
            like: tree of `ShapeDtypeStruct`s with the shardings wanted, which need not be those it was saved with.

        Raises:
            InputError: it belongs to another model, plan, data or configuration; names the first difference.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                state, error = self._read(step, like), None
            except InputError:
                raise
            except Exception as found:
                state, error = None, found
            if anywhere([error is not None])[0]:
                self._pass_over(step, error or ValueError("another process could not read it"))
                continue
            console.print(f"going on from the checkpoint of update {step}", highlight=False)
            self.last_step = step
            return step, state
        return 0, None

    def after(self, step: int, steps: int, state: Any) -> None:
        """To be called after every update: saves the state if that is due, and stops if that is wished.

        Raises:
            InputError: the state, now or last time, could not be written.
            Stopped: SIGTERM arrived or the time is up; the state is saved.
        """
        due, signalled, late = anywhere([self._due(step) or step == steps, terminated(), self._late])
        if not (due or signalled or late):
            return
        try:
            about = {"fingerprint": self.fingerprint, "checksums": checksums(state)}
            items = {"state": ocp.args.StandardSave(named(state)), "about": ocp.args.JsonSave(about)}
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)
            self.last_step, self.last_time = step, time.monotonic()
            if signalled or late or step == steps:
                self.manager.wait_until_finished()
        except Exception as error:
            raise self._refusal(error) from error
        if signalled or late:
            why = "the time is up" if late else "SIGTERM"
            message = f"stopped after update {step} of {steps} ({why}): the same command goes on from there"
            console.print(message, highlight=False, soft_wrap=True)
            raise Stopped

    @property
    def _late(self) -> bool:
        return self.where.deadline is not None and time.monotonic() >= self.where.deadline

    def _due(self, step: int) -> bool:
        every, minutes = self.where.every, self.where.minutes
        by_count = every is not None and step - self.last_step >= every
        return by_count or (minutes is not None and time.monotonic() - self.last_time >= 60 * minutes)

    def _read(self, step: int, like: Any) -> Any:
        saved = self.manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        about, sums = saved["fingerprint"], saved["checksums"]
        self._check_same(about)
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(named(like)))
        found = self.manager.restore(step, args=wanted).state
        if checksums(found) != sums:
            raise ValueError("its contents do not have the checksums they were saved with")
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in named(like)])

    def _check_same(self, before: Record) -> None:
        difference = first_difference(before, self.fingerprint)
        if difference is not None:
            raise InputError(
                f"{self.folder} holds checkpoints of another training: {difference}; repeat its command to go on with "
                "it, or choose another folder"
            )

    def _pass_over(self, step: int, error: Exception) -> None:
        """Say that a checkpoint is of no use, and move it out of the way of a new one of the same update."""
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        console.print(
            f"warning: the checkpoint of update {step} is damaged ({reason}); going back to the one before, or to the "
            "beginning of the stage",
            style="bold red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        # Kept, since it may be the disk or the memory that failed; the whole folder goes when its stage is done.
        if first_process():
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        anywhere([])  # the others wait
        self.manager.reload()

    def _refusal(self, error: Exception) -> Exception:
        """What a person can mend as an InputError; anything else as it is."""
        if not isinstance(error, OSError) and NO_SPACE not in str(error):
            return error
        reason = NO_SPACE if NO_SPACE in str(error) else error
        kept = [step for step in self.manager.all_steps() if (self.folder / str(step)).is_dir()]
        have = f"the checkpoint of update {max(kept)} is whole" if kept else "there is no checkpoint yet"
        return InputError(
            f"cannot write a checkpoint to {self.folder} ({reason}); {have}: make room and repeat the command"
        )
