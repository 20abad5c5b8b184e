"""A student of fewer layers, trained with a teacher and without, as the script does it."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.files.store import load

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def test_a_student_is_trained_with_and_without_a_teacher(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    script = importlib.import_module("lighter_student")
    teacher = load(small_model)
    layers = teacher.config.num_layers
    same = script.keep_layers(teacher, list(range(layers)))
    tokens = np.arange(3, 15)[None]
    np.testing.assert_array_equal(same(tokens), teacher(tokens))
    text = tmp_path / "text.txt"
    text.write_text("The film was good, and the people in it were kind. " * 2000, encoding="utf-8")
    options = script.StudentOptions(
        (str(small_model),), text=text, calibration=text, updates=4, batch=2, window=48, windows=2, lr=2e-3,
        compute="float32", seeds="0", out=tmp_path / "out",
    )  # fmt: skip
    script.lighter_student(options)
    record = json.loads((tmp_path / "out" / "lighter_student.json").read_text(encoding="utf-8"))
    begun, alone, taught = record["rows"]
    assert begun["updates"] == 0
    assert begun["weights"] < 1
    assert begun["token"] == round(layers / 2) / layers
    assert len(alone["losses"]) == len(taught["losses"]) == 4
    for row, how in ((alone, "alone"), (taught, "taught")):
        saved = load(tmp_path / "out" / f"{small_model.name}-{how}-0")
        assert saved.config.num_layers == round(layers / 2)
        assert row["perplexity_change"][0] < begun["perplexity_change"][0]  # both learn a text that repeats itself
    assert taught["kl"][0] < alone["kl"][0]  # one of them stays nearer to the teacher, which knows nothing of it
    assert len(record["findings"]) == 1
    assert not list((tmp_path / "out").glob("*.state"))

    script.lighter_student(dataclasses.replace(options, seeds="0,1"))  # the first seed is not trained again
    record = json.loads((tmp_path / "out" / "lighter_student.json").read_text(encoding="utf-8"))
    assert [row["losses"] for row in record["rows"][1:3]] == [alone["losses"], taught["losses"]]
    assert len(record["rows"]) == 5
    with pytest.raises(InputError, match="trained in another way"):
        script.lighter_student(dataclasses.replace(options, lr=1e-3))
    with pytest.raises(InputError, match="expected some, and not all"):
        script.lighter_student(script.StudentOptions((str(small_model),), text=text, calibration=text, layers=1.0))
    with pytest.raises(InputError, match="expected --text"):
        script.lighter_student(script.StudentOptions((str(small_model),)))
