"""What heads have in common: the script's numbers are those of loops over single rows, and what is planted is found."""

import dataclasses
import importlib
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.data.toy import toy_tokenizer
from chai_jax.errors import InputError
from chai_jax.files.store import save
from chai_jax.model.layerwise import anonymous, embed_text, how_in_float32, seen_through
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.spec import Spec
from tests.analyse.test_basis_costs import CONFIG

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TEXT = np.random.default_rng(0).integers(3, 60, (3, 130)).astype(np.int32)


@pytest.fixture
def redundancy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("redundancy")


def model_of(**changes: dict[str, np.ndarray]) -> Model:
    """Two layers of four query heads, two a key; `changes` replace kernels of the first layer."""
    spec = Spec.of(CONFIG, "bfloat16")
    model = Model(CONFIG, spec, init(CONFIG, spec, jax.random.key(1), 0.5))
    for name, kernel in changes.items():
        model.params["layers"]["0"][name] = {**model.params["layers"]["0"][name], "kernel": jnp.asarray(kernel)}
    return model


def sums(redundancy: ModuleType, model: Model) -> dict[str, np.ndarray]:
    mask = np.ones(TEXT.shape, bool)
    about = model.config, anonymous(model.spec.layers[0]), how_in_float32(model)
    found = redundancy.layer_sums(*about, model.params["layers"]["0"], embed_text(model, TEXT, mask), mask)
    return {name: np.asarray(each, np.float64) for name, each in found.items()}


def attention(model: Model) -> np.ndarray:
    mask = np.ones(TEXT.shape, bool)
    see = jax.jit(partial(seen_through, model.config, model.spec.layers[0], how_in_float32(model)))
    seen = see(model.params["layers"]["0"], embed_text(model, TEXT, mask), mask)[1]
    return np.asarray(seen.probabilities, np.float64)


def test_correlations_are_those_of_single_rows(redundancy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redundancy, "SINK", 0.02)  # so that this random model has some
    jax.clear_caches()
    model = model_of()
    total, rows = sums(redundancy, model), attention(model)
    products = {name: np.zeros((4, 4)) for name in ("all", "first", "rest", "other_text")}
    kept: list[list[np.ndarray]] = []
    to_first = to_sinks = 0.0
    for window in rows:
        sinks = [s for s in range(1, 67) if window[:, s:, s].mean() >= 0.02]
        assert sinks
        kept.append([])
        for t in range(130):
            read = {"all": range(t + 1), "first": range(1, t + 1)}
            read["rest"] = [s for s in read["first"] if s not in sinks]
            for name, keys in read.items():
                row = window[:, t, list(keys)]
                row = row - row.mean(axis=1, keepdims=True) if row.size else row
                products[name] += row @ row.T
            whole = np.zeros((4, 130))
            whole[:, read["rest"]] = row
            kept[-1].append(whole)
            if t:
                to_first += window[:, t, 0].mean()
                to_sinks += window[:, t, [s for s in sinks if s <= t]].sum(axis=1).mean()
    for window, other in pairwise(kept):
        products["other_text"] += sum(one @ two.T for one, two in zip(window, other, strict=True))
    for name, product in products.items():
        np.testing.assert_allclose(total[name], product, rtol=1e-4, atol=1e-5)
    assert total["sink"] == pytest.approx(to_first, rel=1e-5)
    assert total["sinks"] == pytest.approx(to_sinks, rel=1e-5)
    assert (total["read"], total["windows"], total["others"]) == (3 * 129, 3, 2)
    jax.clear_caches()


def test_heads_with_one_query_are_wholly_alike(redundancy: ModuleType) -> None:
    query = np.asarray(model_of().params["layers"]["0"]["query"]["kernel"]).copy()
    query[:, 1] = query[:, 0]
    found = redundancy.alike(sums(redundancy, model_of(query=query)), 2)
    assert found["correlation"][0, 1] == pytest.approx(1.0, abs=1e-5)
    assert found["alike"] == {"all": 1, "first": 1, "rest": 1}
    assert found["pairs"] == 6
    pairs = found["correlation"][[0, 2], [1, 3]]
    assert found["within"] == pytest.approx(np.median(pairs))
    assert redundancy.alike(sums(redundancy, model_of()), 1)["within"] is None


def test_keys_of_few_dimensions_are_seen_before_their_rotation(redundancy: ModuleType) -> None:
    """Keys of two dimensions; the rotation spreads them over more."""
    key = np.asarray(model_of().params["layers"]["0"]["key"]["kernel"]).copy()
    key[..., 2:] = 0.0
    total = sums(redundancy, model_of(key=key))
    energies = {name: redundancy.held(redundancy.variances(total, name)) for name in ("keys", "keys, rotated")}
    assert energies["keys"][1] == pytest.approx(1.0, abs=1e-6)
    assert redundancy.dimensions(energies["keys"]) <= 2.0
    assert 2.0 < redundancy.dimensions(energies["keys, rotated"]) <= 4.0  # each with its other half


def test_dimensions_lie_between_whole_numbers(redundancy: ModuleType) -> None:
    assert redundancy.dimensions(np.array([0.5, 0.98, 1.0])) == pytest.approx(2.5)
    assert redundancy.held(np.array([[1.0, 3.0], [2.0, 2.0]])) == pytest.approx([0.625, 1.0])


def test_tables_and_pictures_of_a_small_model(redundancy: ModuleType, tmp_path: Path) -> None:
    tokenizer, folder = toy_tokenizer(), tmp_path / "model"
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer))
    spec = Spec.of(config, "bfloat16")
    save(Model(config, spec, init(config, spec, jax.random.key(0), 0.1), tokenizer), folder)
    text = tmp_path / "text.txt"
    text.write_text("the film was not good but the plot was fine . " * 300, encoding="utf-8")
    options = redundancy.RedundancyOptions((str(folder),), calibration=text, seeds="0", out=tmp_path / "out")
    said = redundancy.redundancy(options)
    assert said["rows"] == 2
    assert "correlation of 12 pairs" in said["findings"][0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"model-{what}.{kind}" for what in ("heads", "layers", "spectra") for kind in ("png", "svg", "csv")} < names
    text.write_text("short", encoding="utf-8")
    with pytest.raises(InputError, match="expected two or more"):
        redundancy.redundancy(dataclasses.replace(options, out=tmp_path / "other"))


def test_windows_that_fill_up_a_batch_count_for_nothing(redundancy: ModuleType) -> None:
    model = model_of()
    mask = np.array([[True] * 130] * 3 + [[False] * 130])
    tokens = np.concatenate([TEXT, TEXT[:1]])
    about = model.config, anonymous(model.spec.layers[0]), how_in_float32(model)
    found = redundancy.layer_sums(*about, model.params["layers"]["0"], embed_text(model, tokens, mask), mask)
    for name, each in sums(redundancy, model).items():
        np.testing.assert_allclose(np.asarray(found[name]), each, rtol=1e-4, atol=1e-4)
