"""What rounding alone does, as the script measures it."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.serve.decode import serving_params

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("rounding")


def test_the_ways_are_equal_but_for_rounding(rounding: ModuleType, small_model: Path) -> None:
    model = load(small_model, storage="float32")
    params, prompt = serving_params(model, model.how), list(range(4, 44))
    alone = rounding.read_in(model, params, "by itself", prompt)
    assert np.exp(alone).sum() == pytest.approx(1, abs=1e-5)
    for way in rounding.WAYS:
        np.testing.assert_allclose(rounding.read_in(model, params, way, prompt), alone, atol=1e-4)
    assert np.abs(rounding.read_in(model, params, "by itself", prompt[:-1]) - alone).max() > 1e-3


def test_divergences_are_means_over_prompts(rounding: ModuleType) -> None:
    half, most = np.log([0.5, 0.5]), np.log([0.8, 0.2])
    each = 0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)
    found = rounding.mean_kl([half, half], [half, most])
    assert found["mean"] == pytest.approx(each / 2)
    assert found["error"] == pytest.approx(each / 2)


def test_a_short_text_is_refused(rounding: ModuleType, small_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short", encoding="utf-8")
    with pytest.raises(InputError, match="expected two or more"):
        rounding.rounding(rounding.RoundingOptions((str(small_model),), text=text, length=40, out=tmp_path / "out"))
