"""The built-in toy is trained once, whoever asks for it first."""

import threading
import time
from pathlib import Path

import pytest

from chai_jax.adapt import toy
from chai_jax.files import lock
from chai_jax.files.store import load
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model


@pytest.fixture
def trainings(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were trained with; training is replaced by a short wait."""
    seeds: list[int] = []

    def train(seed: int, execution: Execution | None) -> Model:
        seeds.append(seed)
        time.sleep(0.5)
        return load(small_model)

    monkeypatch.setattr(toy, "_trained", train)
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    return seeds


def test_of_two_first_uses_at_once_the_second_waits(
    trainings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found: list[Model] = []
    users = [threading.Thread(target=lambda: found.append(toy.toy_model())) for _ in range(2)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert trainings == [0]
    assert len(found) == 2
    assert capsys.readouterr().err.count("which is training the built-in toy") == 1
    assert [path.name for path in (tmp_path / "chai_jax").iterdir()] == ["toy-1-0"]
    toy.toy_model()
    assert trainings == [0]


def test_where_nothing_can_be_kept_it_is_trained_all_the_same(
    trainings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert toy.toy_model(3).config.num_layers == 2
    assert trainings == [3]
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be kept" in said
    assert "(kept for the next run)" not in said
