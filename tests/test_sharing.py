"""What sharing between heads costs, as the script measures it: nothing where heads are equal, in the bytes it says."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

from chai_jax.data.toy import toy_tokenizer
from chai_jax.errors import InputError
from chai_jax.files.store import load, save
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.spec import Spec
from tests.analyse.test_basis_costs import CONFIG

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("sharing")


def saved(folder: Path) -> Model:
    """Two layers of two key heads, with equal keys and equal queries, and values of their own."""
    tokenizer = toy_tokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer))
    spec = Spec.of(config, "bfloat16")
    model = Model(config, spec, init(config, spec, jax.random.key(0), 0.3), tokenizer)
    for layer in model.params["layers"].values():
        for name in ("query", "key"):
            kernel = layer[name]["kernel"]
            half = kernel[:, : kernel.shape[1] // 2]
            layer[name] = {**layer[name], "kernel": jnp.concatenate([half, half], axis=1)}
    save(model, folder)
    return model


def test_equal_heads_share_for_nothing(sharing: ModuleType, tmp_path: Path) -> None:
    saved(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the film was not good but the plot was fine . " * 300, encoding="utf-8")
    wanted = "qk-1,qkv-1,kv-0.5,queries"
    options = sharing.SharingOptions(
        (str(tmp_path / "model"),), text=text, calibration=text, windows=2, window=128, rows=wanted, seeds="0",
        out=tmp_path / "out",
    )  # fmt: skip
    sharing.sharing(options)
    rows = json.loads((tmp_path / "out" / "sharing.json").read_text(encoding="utf-8"))["rows"]
    found = {row["cache"]: row for row in rows}
    names = {"qk-1", "qk-1-half", "qk-1-random", "qkv-1", "qkv-1-low_rank", "kv-0.5", "queries-1"}
    assert found.keys() == names
    sizes = {"qk-1": 0.75, "qk-1-half": 0.875, "qk-1-random": 0.75, "qkv-1": 0.5, "kv-0.5": 0.5, "queries-1": 1.0}
    assert {name: found[name]["token"] for name in sizes} == sizes
    assert all(abs(found[name]["kl"][0]) < 1e-5 for name in ("qk-1", "qk-1-half", "qk-1-random"))
    assert all(found[name]["kl"][0] > 1e-3 for name in ("qkv-1", "kv-0.5"))
    assert found["queries-1"]["macs"] < 1.0
    assert found["qk-1"]["weights"] < 1.0
    assert (
        load(tmp_path / "out" / "model-qkv-1").kv_bytes_per_token == 0.5 * load(tmp_path / "model").kv_bytes_per_token
    )
    with pytest.raises(InputError, match="no rows 'nonsense'"):
        sharing.sharing(dataclasses.replace(options, rows="nonsense"))
    with pytest.raises(InputError, match="expected --text FILE"):
        sharing.sharing(dataclasses.replace(options, text=None))


def test_how_many_heads_stay(sharing: ModuleType) -> None:
    assert [sharing.counts(heads) for heads in (1, 2, 3, 8)] == [[], [1], [2, 1], [6, 4, 2]]
