"""A family is data: another one needs no other code to be read and written."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.files.convert import to_hf, to_params
from chai_jax.files.export import export
from chai_jax.files.families import opt, registry
from chai_jax.files.families.registry import FAMILIES, find_family
from chai_jax.files.store import load, save
from chai_jax.plans.architecture import Architecture

OTHER = dataclasses.replace(
    opt.FAMILY,
    model_type="other",
    name="Other",
    torch_class="OtherForCausalLM",
    parse_config=lambda fields, where: dataclasses.replace(opt.parse_config(fields, where), family="other"),
    tensors={
        **opt.TENSORS,
        "embed.tokens": "wte",
        "head": "embed_out",
        "layers.{}.query": "h.{}.attention.q",
        "final_norm": "ln_f",
    },
    prefixes=("transformer.", ""),
    published={},
    licence=None,
)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """A second family, made known, and an architecture of it."""
    monkeypatch.setitem(registry.FAMILIES, "other", OTHER)
    return dataclasses.replace(Architecture(19, 12, 2, 3, 20, 16, 12), tied=False, family="other")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_by_its_name(name: str) -> None:
    family = FAMILIES[name]
    assert find_family(name, "x") == (family, True)
    assert find_family(f"chai_{name}", "x") == (family, False)
    for shape in family.published.values():
        assert shape.family == name


@pytest.mark.parametrize("name", ["bloom", "chai_", "chai_chai_opt", "OPT", None, ["opt"], 3])
def test_another_type_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match=r"x holds a model of type .*; expected one of opt, llama"):
        find_family(name, "x")


def test_names_are_the_family_s(other: Architecture, random_model: Callable[..., Any]) -> None:
    model = random_model(other)
    tensors = to_hf(other, model.params)
    assert {
        "transformer.wte.weight",
        "embed_out.weight",
        "transformer.h.1.attention.q.bias",
        "transformer.layers.1.fc1.weight",
        "transformer.ln_f.weight",
    } <= tensors.keys()
    back = to_params(other, tensors)
    np.testing.assert_array_equal(back["head"]["kernel"], model.params["head"]["kernel"])
    np.testing.assert_array_equal(
        back["layers"]["1"]["query"]["kernel"], model.params["layers"]["1"]["query"]["kernel"]
    )


@pytest.mark.parametrize(("storage", "kind"), [("float32", "other"), ("int8", "chai_other")])
def test_saved_and_loaded(
    other: Architecture, random_model: Callable[..., Any], tmp_path: Path, storage: str, kind: str
) -> None:
    model = random_model(other, storage=storage)
    save(model, tmp_path / "out")
    assert f'"{kind}"' in (tmp_path / "out/config.json").read_text()
    loaded = load(tmp_path / "out")
    assert loaded.config == other
    np.testing.assert_array_equal(loaded.params["embed"]["tokens"], model.params["embed"]["tokens"])
    card = (tmp_path / "out/README.md").read_text()
    assert ("An ordinary Other" if storage == "float32" else "A compressed Other") in card
    assert "- other" in card


def test_exported(other: Architecture, random_model: Callable[..., Any], tmp_path: Path) -> None:
    export(random_model(other), tmp_path / "out")
    text = (tmp_path / "out/config.json").read_text()
    assert '"OtherForCausalLM"' in text
    assert '"model_type": "other"' in text
