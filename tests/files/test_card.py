"""The model card carries the base model's name and licence on, through any number of savings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from chai_jax.compress.quantize import with_storage
from chai_jax.files.card import front_matter, origin
from chai_jax.files.export import export
from chai_jax.files.families.opt import LICENCE
from chai_jax.files.store import load, save
from chai_jax.inputs.reading import SMALL
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.model import Model
from chai_jax.plans.architecture import Architecture, Rotary

CONFIG = Architecture(19, 12, 2, 3, 20, 16, 12)


@pytest.fixture
def from_(random_model: Any) -> Callable[[str], Model]:
    """A model of which only the cache is compressed, that was loaded from `source`."""
    return lambda source: random_model(CONFIG, storage="int8", source=source)


def base(folder: Path, front: str) -> str:
    """A folder with a card and a licence."""
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n# A model\n\nlicense: not-this-one\n")
    (folder / "LICENSE.md").write_text("You may.")
    return str(folder)


def test_licence_goes_along(tmp_path: Path, from_: Any) -> None:
    source = base(
        tmp_path / "base", 'license: other\nlicense_name: "so-so"\nlicense_link: LICENSE.md\ninference: false'
    )
    save(from_(source), tmp_path / "one")
    export(load(tmp_path / "one"), tmp_path / "two")
    for folder in ("one", "two"):
        fields = metadata_load(tmp_path / folder / "README.md")
        assert (fields["license"], fields["license_name"], fields["license_link"]) == ("other", "so-so", "LICENSE.md")
        assert (tmp_path / folder / "LICENSE.md").read_text() == "You may."
        text = (tmp_path / folder / "README.md").read_text()
        assert "(license: other, license_name: so-so, license_link: LICENSE.md). Its text is in LICENSE.md." in text
        assert str(tmp_path) not in text


def test_opt_of_facebook(tmp_path: Path, from_: Any) -> None:
    """Nothing of it is on this machine; its licence is known all the same, and stays with what is made from it."""
    save(from_("facebook/opt-125m"), tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    for folder in ("one", "two"):
        fields = metadata_load(tmp_path / folder / "README.md")
        assert (fields["base_model"], fields["license"]) == ("facebook/opt-125m", "other")
        assert fields["license_link"].endswith("projects/OPT/MODEL_LICENSE.md")
        assert LICENCE.notice in (tmp_path / folder / "README.md").read_text()


@pytest.mark.parametrize("source", ["", "nowhere/at-all", "runs/a--b", "/no/such/folder"])
def test_unknown_licence_is_called_unknown(source: str) -> None:
    assert origin(source).licence == {"license": "unknown"}


def test_front_matter_that_is_none(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert front_matter(card) == {}
    for text in ("", "# Model\nlicense: mit\n", "---\nlicense: mit\n", "\n---\nlicense: mit\n---\n"):
        card.write_text(text)
        assert front_matter(card) == {}
    card.write_bytes(b"---\nlicense: \xff\n---\n")
    assert front_matter(card) == {}
    card.write_text("---\nlicense: mit\nbase_model:\n- a\ntags: []\n---\n")
    assert front_matter(card) == {"license": "mit", "tags": "[]"}


def test_grouped_heads_are_told_apart(tmp_path: Path, random_model: Any) -> None:
    """Of a family without a licence of its own, whose name the card says."""
    config = dataclasses.replace(CONFIG, num_kv_heads=1, rotary=Rotary(), position_offset=0, norm="rms", gated=True)
    config = dataclasses.replace(config, bias=False, activation="silu", family="llama")
    save(random_model(config, storage="int8", source="someone/her-llama"), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "A compressed Llama (2 layers of 3 heads (1 key/value heads), width 12)" in text
    assert "| 0 | dense | 1 | 1 | int8 | loaded |" in text
    fields = metadata_load(tmp_path / "out/README.md")
    assert (fields["base_model"], fields["license"], fields["tags"]) == ("someone/her-llama", "unknown", ["llama"])


def test_numbers_are_the_model_s(tmp_path: Path, from_: Any) -> None:
    model = from_("facebook/opt-125m")
    save(model, tmp_path / "one")
    text = (tmp_path / "one/README.md").read_text()
    dense = bytes_per_token(with_storage(model, "bfloat16").spec)
    assert f"take {model.nbytes:,} bytes, its K,V cache {model.kv_bytes_per_token:,} bytes per token ({dense:,}" in text
    assert "| 1 | dense | 3 | 3 | int8 | loaded |" in text


def test_a_byte_order_mark_loses_no_licence(tmp_path: Path, from_: Any) -> None:
    source = base(tmp_path / "base", "license: mit\nbase_model: some/one")
    card = tmp_path / "base/README.md"
    card.write_bytes(b"\xef\xbb\xbf" + card.read_bytes())
    save(from_(source), tmp_path / "one")
    front = metadata_load(tmp_path / "one/README.md")
    assert (front["license"], front["base_model"]) == ("mit", "some/one")


def test_a_licence_is_a_text(tmp_path: Path, from_: Any) -> None:
    source = base(tmp_path / "base", "license: mit")
    (tmp_path / "base/LICENSE.txt").write_text("You may.")
    with (tmp_path / "base/LICENSE.md").open("r+b") as file:
        file.truncate(SMALL + 1)
    assert [file.name for file in origin(source).files] == ["LICENSE.txt"]
    save(from_(source), tmp_path / "one")
    assert not (tmp_path / "one/LICENSE.md").exists()
