"""Distillation with a cache of few bits in the loop, as the script does it."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from chai_jax.compress.quantize import with_storage
from chai_jax.errors import InputError
from chai_jax.files.store import load, save

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.mark.slow
def test_a_student_is_trained_and_saved(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    script = importlib.import_module("few_bits_distil")
    student = with_storage(load(small_model), "k2v2")
    random = np.random.default_rng(0)  # what there is to learn: to be as it was
    changed = jax.tree.map(lambda x: x + 0.05 * random.normal(size=x.shape).astype(x.dtype), student.params)
    student = student.replace(params=changed)
    save(student, tmp_path / "student")
    text = tmp_path / "text.txt"
    text.write_text("The film was good, and the people in it were kind. " * 2000, encoding="utf-8")
    options = script.DistilOptions(
        (str(small_model),), compressed=(str(tmp_path / "student"),), calibration=text, updates=20, batch=2, window=48,
        lr=2e-3, compute="float32", seeds="0", out=tmp_path / "out",
    )  # fmt: skip
    script.few_bits_distil(options)
    trained = load(tmp_path / "out" / "student")
    assert trained.spec == student.spec
    moved = jax.tree.map(lambda old, new: float(np.abs(np.asarray(old) - np.asarray(new)).max()), *(
        model.params["layers"]["0"]["query"]["kernel"] for model in (student, trained)
    ))  # fmt: skip
    assert moved > 1e-4
    (row,) = json.loads((tmp_path / "out" / "few_bits_distil.json").read_text(encoding="utf-8"))["rows"]
    assert len(row["all_kl"]) == 20
    assert row["kl"][1] < row["kl"][0]
    script.few_bits_distil(options)  # is done, and is not done again: the folder would be taken
    with pytest.raises(InputError, match="expected one MODEL"):
        script.few_bits_distil(script.DistilOptions((str(small_model),)))
