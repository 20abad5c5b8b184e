"""A teacher's answers on disk: computed once for every example, so that the teacher need not be in memory to train.

A row of log-probabilities [V] for each target of each example, in one .npy file that is read a few rows at a time.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from chai_jax.adapt.fingerprint import checksums, hash_arrays
from chai_jax.adapt.updates import Batch, pack_update
from chai_jax.console import console, track
from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError
from chai_jax.files.atomic import new_file, write_json
from chai_jax.inputs.reading import Record
from chai_jax.model.decoder import HEAD_ROWS_TRAINED, forward
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.sharding import Layout
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.score.loglikelihood import logits_at

FULLEST = 0.9  # of the free disk space that may be filled


@dataclass(frozen=True)
class CachedTeacher:
    """Log-probabilities at the targets of a stage's examples.

    Attributes:
        values: float [N, V], memory-mapped; the targets of all examples one after the other.
        begins: int [examples + 1], where each example's targets begin.
        about: what they are of, as JSON.
    """

    values: Any
    begins: Any
    about: Record

    def attach(self, batch: Batch, members: Sequence[int] | np.ndarray) -> Batch:
        """The update of these examples with the teacher's log-probabilities [microbatches, B, P, V] beside it."""
        shape = batch.positions.shape
        rows = np.zeros((shape[0] * shape[1], shape[2], self.values.shape[1]), self.values.dtype)
        for row, member in enumerate(members):
            begin, end = self.begins[member], self.begins[member + 1]
            rows[row, : end - begin] = self.values[begin:end]
        return dataclasses.replace(batch, teacher=rows.reshape(*shape, -1))


def cache_teacher(
    teacher: Model, folder: Path, stored: str, how: Execution, encoded: Sequence[Encoded]
) -> CachedTeacher:
    """Run the teacher over the examples, or take what an earlier call left in `folder` for the same ones.

    Args:
        stored: `float32` or `float16`.
        how: what the updates run by.

    Raises:
        InputError: the disk is too small for it, or there is more than one process.
    """
    if jax.process_count() > 1:
        raise InputError("a teacher's answers are cached by one process only: leave out --cache-teacher")
    params = how.layout.params(teacher.config, teacher.spec, teacher.params)
    targets = [len(one.tokens) - one.start for one in encoded]
    begins = np.concatenate([[0], np.cumsum(targets)])
    shape = (int(begins[-1]), teacher.config.vocab_size)
    about: Record = {
        "stored": stored,
        "compute": how.dtype.name,
        "spec": teacher.spec.to_json(),
        "weights": checksums(params),
        "examples": hash_arrays(part for one in encoded for part in (one.tokens, (one.start,))),
    }
    about = json.loads(json.dumps(about))
    path, note = folder / "teacher.npy", folder / "teacher.json"
    if not (path.exists() and note.exists() and json.loads(note.read_text(encoding="utf-8")) == about):
        folder.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        check_room(folder, shape, stored)
        with new_file(path) as temporary:
            values = np.lib.format.open_memmap(temporary, "w+", np.dtype(stored), shape)
            with temporary.open("r+b") as file:  # on a full disk an error here, the end later
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            compute = partial(logprobs, teacher.config, teacher.spec, how, params)
            fill(values, begins, compute, how.layout, encoded, teacher.config.max_positions)
            values.flush()
        write_json(note, about)
    return CachedTeacher(np.load(path, mmap_mode="r"), begins, about)


def check_room(folder: Path, shape: tuple[int, int], stored: str) -> None:
    """Say how large the file will be; raise InputError where the disk has no room for it."""
    size, free = shape[0] * shape[1] * np.dtype(stored).itemsize, shutil.disk_usage(folder).free
    what = f"{size / 1e9:,.3f} GB ({shape[0]:,} targets x {shape[1]:,} tokens in {stored})"
    if size > FULLEST * free:
        raise InputError(
            f"the teacher's answers take {what}, {folder} has {free / 1e9:,.3f} GB free; expected room for them: "
            "leave out --cache-teacher, or use float16 or fewer examples"
        )
    console.print(f"caching the teacher's answers: {what}", highlight=False)


def fill(values: Any, begins: Any, compute: Any, layout: Layout, encoded: Sequence[Encoded], longest: int) -> None:
    """Write every example's log-probabilities; examples of like length share a batch."""
    widest = max(len(one.tokens) - one.start for one in encoded)
    rows = layout.ways * max(1, min(64, HEAD_ROWS_TRAINED // widest) // layout.ways)
    order = sorted(range(len(encoded)), key=lambda at: len(encoded[at].tokens))
    batches = [order[at : at + rows] for at in range(0, len(order), rows)]
    for members in track(batches, "Teacher"):
        batch = layout.join(pack_update([encoded[member] for member in members], (1, rows), longest, widest), rows)
        found = np.asarray(compute(jax.tree.map(lambda x: x[0], batch)))
        for row, member in enumerate(members):
            begin, end = begins[member], begins[member + 1]
            values[begin:end] = found[row, : end - begin]


@partial(jax.jit, static_argnums=(0, 1, 2))
def logprobs(config: Architecture, spec: Spec, how: Execution, params: Params, batch: Batch) -> Float[Array, "B P V"]:
    """float32 log-probabilities of the next token at the positions of a batch."""
    hidden = forward(config, spec, params, batch.tokens, batch.mask, how).hidden
    return jax.nn.log_softmax(logits_at(config, params, hidden, batch.positions, how))
