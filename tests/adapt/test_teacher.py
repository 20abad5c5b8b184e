"""A teacher whose answers were cached teaches as one that is there."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.adapt import teacher as caching
from chai_jax.adapt.distil import distil
from chai_jax.adapt.teacher import cache_teacher
from chai_jax.adapt.updates import pack_update
from chai_jax.config import Checkpoints, DistilConfig, TrainConfig
from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.sharding import Layout, make_mesh

pytestmark = pytest.mark.slow  # together they take minutes

Build = Callable[..., Model]
TRAIN = TrainConfig(lr=1e-3, batch=8, accumulation=2, max_steps=3)


@pytest.fixture(scope="module")
def teacher(tiny: Build) -> Model:
    return tiny(1, hidden_size=24, num_heads=3, ffn_dim=40, embed_dim=24)


def means(student: Model, teacher: Model, examples: list[Encoded], cached: str | None, **rest: Any) -> np.ndarray:
    """Loss, kl, ce and gradient norm of every update."""
    log: list[dict[str, Any]] = []
    distil(student, teacher, examples, DistilConfig(TRAIN, cache_teacher=cached), log.append, **rest)
    return np.array([[entry[name] for name in ("loss", "kl", "ce", "grad_norm")] for entry in log])


def test_losses_and_gradients_are_those_of_a_teacher_that_is_there(
    tiny: Build, teacher: Model, examples: list[Encoded]
) -> None:
    present = means(tiny(), teacher, examples, None)
    np.testing.assert_allclose(means(tiny(), teacher, examples, "float32"), present, atol=1e-5, rtol=1e-5)
    half = means(tiny(layout=Layout(make_mesh())), teacher, examples, "float16")
    np.testing.assert_allclose(half, present, atol=5e-3)
    assert not np.array_equal(half, present)


def test_the_file_holds_every_target_once_and_is_used_again(
    tiny: Build,
    teacher: Model,
    examples: list[Encoded],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cache(of: Model) -> caching.CachedTeacher:
        return cache_teacher(of, tmp_path, "float32", of.how, examples)

    found = cache(teacher)
    targets = sum(len(one.tokens) - one.start for one in examples)
    assert np.load(tmp_path / "teacher.npy").shape == (targets, 53)
    size = (tmp_path / "teacher.npy").stat().st_size
    assert size == targets * 53 * 4 + 128  # numpy's header
    assert f"{targets} targets x 53 tokens in float32" in " ".join(capsys.readouterr().err.split())
    for at, one in enumerate(examples):
        logits = np.asarray(teacher(np.array([one.tokens[:-1]])), np.float64)[0, one.start - 1 :]
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(found.values[found.begins[at] : found.begins[at + 1]], expected, atol=1e-4)
    members = [3, 0, 9]
    batch = found.attach(pack_update([examples[at] for at in members], (2, 2), 32, 6), members)
    assert batch.teacher.shape == (*batch.positions.shape, 53)
    np.testing.assert_array_equal(batch.teacher[0, 1, 0], found.values[found.begins[0]])
    assert not batch.teacher[1, 1].any()

    fill = caching.fill
    monkeypatch.setattr(caching, "fill", None)
    assert cache(teacher).about == found.about
    monkeypatch.setattr(caching, "fill", fill)
    assert cache(tiny(2)).about != found.about
    assert json.loads((tmp_path / "teacher.json").read_text())["stored"] == "float32"


def test_a_disk_without_room_is_refused(
    tiny: Build,
    teacher: Model,
    examples: list[Encoded],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        InputError, match=r"answers take 0\.\d+ GB \(\d+ targets x 53 tokens in float32\), .* has 0\.000 GB"
    ):
        means(tiny(), teacher, examples, "float32", checkpoints=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_has_taken_the_whole_file_before_the_teacher_runs(
    tiny: Build, examples: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full would end the program without a word when a page of the file is first written."""
    taken: list[float] = []

    def look(values: Any, *_: Any) -> None:
        found = Path(values.filename).stat()
        taken.append(512 * found.st_blocks / found.st_size)

    monkeypatch.setattr(caching, "fill", look)
    large = tiny(vocab_size=1000)
    cache_teacher(large, tmp_path, "float32", large.how, examples)
    assert taken[0] >= 1


def test_it_lies_with_the_checkpoints_and_a_kill_does_not_lose_it(
    tiny: Build,
    teacher: Model,
    examples: list[Encoded],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = Checkpoints(tmp_path / "state", every=1, deadline=0.0)
    with pytest.raises(SystemExit):
        means(tiny(), teacher, examples, "float32", checkpoints=where)
    monkeypatch.setattr(caching, "fill", None)
    log = means(tiny(), teacher, examples, "float32", checkpoints=tmp_path / "state")
    np.testing.assert_allclose(log, means(tiny(), teacher, examples, None)[1:], atol=1e-5)


def test_refuses_an_unknown_format() -> None:
    with pytest.raises(InputError, match="cache_teacher is 'int8'"):
        DistilConfig(cache_teacher="int8")


def test_many_processes_are_refused(
    teacher: Model, examples: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="by one process only"):
        cache_teacher(teacher, tmp_path, "float32", teacher.how, examples)
