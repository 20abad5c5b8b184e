"""Accuracies with few bits in the cache: paired with the dense model's, question by question, and kept."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.evaluation.result import Result

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("few_bits_tasks")


def test_answers_are_paired_and_kept(
    tasks: ModuleType, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An oracle: right of every question when dense, and not of every third with k2v2; by length it is never right."""
    asked: list[str] = []

    def evaluate(model: Any, task: str, data_dir: Path | None, limit: int | None) -> Result:
        n = limit or 9
        few = any(group.storage == "k2v2" for layer in model.spec.layers for group in layer.groups)
        asked.append(task)
        right = np.array([not few or at % 3 for at in range(n)])
        scores = np.where(right[:, None], [[-1.0, -2.0]], [[-2.0, -1.0]])
        lengths = np.array([[1, 100]] * n) if task == "piqa" else None
        return Result(task, np.zeros(n, int), scores, np.zeros((n, 2), bool), lengths)

    monkeypatch.setattr(tasks, "evaluate", evaluate)
    options = tasks.TaskOptions((str(small_model),), tasks="piqa:6,sst2", storages="k2v2", seeds="0", out=tmp_path)
    for _ in range(2):
        tasks.few_bits_tasks(options)
        assert asked == ["piqa", "sst2"] * 2
    rows = json.loads((tmp_path / "few_bits_tasks.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["task"], row["cache"], row["n"]) for row in rows] == [
        ("piqa", "bfloat16", 6), ("piqa", "k2v2", 6), ("sst2", "bfloat16", 9), ("sst2", "k2v2", 9),
    ]  # fmt: skip
    assert rows[1]["plain"]["flips"] == {"right_to_wrong": 2, "wrong_to_right": 0}
    assert rows[1]["plain"]["difference"] == pytest.approx(-1 / 3)
    assert rows[1]["by_length"]["acc"] == 0
    assert rows[3]["by_length"] is None
    assert rows[1]["token"] < 0.3
    table = (tmp_path / "few_bits_tasks.md").read_text(encoding="utf-8").splitlines()
    assert "| 100.0 % | - | 0, 0 | 0.0 % | - |" in table[6 + 2]
    assert "| 66.7 % | -33.3 [-74.7, +8.0] | 2, 0 | 0.0 % |" in table[6 + 3]


def test_tasks_are_checked(tasks: ModuleType) -> None:
    with pytest.raises(InputError, match="expected NAME or NAME:N"):
        _ = tasks.TaskOptions(("m",), tasks="piqa:many").limits
