"""Accuracies with few bits in the cache: paired with the dense model's, question by question, and kept."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from chai_jax.data.multiple_choice import Task
from chai_jax.data.tasks import get_task
from chai_jax.data.toy import toy_tokenizer
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

    def evaluate(model: Any, asked_for: Task, data_dir: Path | None, limit: int | None) -> Result:
        n, task = limit or 9, asked_for.name
        few = any(group.storage == "k2v2" for layer in model.spec.layers for group in layer.groups)
        asked.append(task)
        right = np.array([not few or at % 3 for at in range(n)])
        scores = np.where(right[:, None], [[-1.0, -2.0]], [[-2.0, -1.0]])
        lengths = np.array([[1, 100]] * n) if task == "piqa" else None
        return Result(task, np.zeros(n, int), scores, np.zeros((n, 2), bool), lengths)

    monkeypatch.setattr(tasks, "evaluate", evaluate)
    monkeypatch.setattr(tasks, "long_questions", lambda tokenizer, task, limit, options: f"{task.name}: {limit}")
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
    assert table[-2:] == ["- piqa: 6", "- sst2: None"]
    assert "| 66.7 % | -33.3 [-74.7, +8.0] | 2, 0 | 0.0 % |" in table[6 + 3]


def test_shots_are_whole_questions_before_each(tasks: ModuleType, tmp_path: Path) -> None:
    rows = [{"goal": f"to do {at}", "sol1": f"well {at}", "sol2": f"badly {at}", "label": at % 2} for at in range(3)]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = tasks.TaskOptions(("m",), data_dir=tmp_path, shots=2).task("piqa")
    question = task.question({"goal": "now", "sol1": "yes", "sol2": "no", "label": 0})
    assert question.context == (
        "Question: to do 0\nAnswer: well 0\n\nQuestion: to do 1\nAnswer: badly 1\n\nQuestion: now\nAnswer:"
    )
    assert question.choices == (" yes", " no")
    assert tasks.TaskOptions(("m",)).task("piqa") == get_task("piqa")


def test_long_questions_are_counted(tasks: ModuleType, tmp_path: Path) -> None:
    """A word is a token: of two questions one is longer than a block."""
    rows = [{"goal": "film " * count, "sol1": "a", "sol2": "ab", "label": 0} for count in (10, 100)]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    told = tasks.long_questions(toy_tokenizer(), get_task("piqa"), None, tasks.TaskOptions(("m",), data_dir=tmp_path))
    assert told.startswith("piqa: a question with its longest answer has ")
    assert told.endswith("50 % have more than 64, a block in progress.")


def test_tasks_are_checked(tasks: ModuleType) -> None:
    with pytest.raises(InputError, match="expected NAME or NAME:N"):
        _ = tasks.TaskOptions(("m",), tasks="piqa:many").limits
