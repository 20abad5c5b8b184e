"""A folder's tokenizer: OPT's </s> in front, nothing where there is none, and a word where there is half of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chai_jax.analyse.probe import probe
from chai_jax.data.batches import Example, encode, encode_all
from chai_jax.data.text import windows
from chai_jax.errors import InputError
from chai_jax.files.store import load, save
from chai_jax.files.tokenizer import load_tokenizer
from chai_jax.model.model import Model
from chai_jax.plans.architecture import Architecture
from chai_jax.serve.generate import generate, stream

CONFIG = Architecture(300, 12, 2, 3, 20, 16, 12)
Files = Callable[[Path], None]


def test_text_begins_with_the_end_token(tmp_path: Path, write_tokenizer: Files) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, CONFIG)
    tokens = tokenizer("a b")["input_ids"]
    assert tokens[0] == 2
    assert len(tokens) == 4
    assert tokenizer.decode(tokens) == "</s>a b"


def test_it_survives_saving_and_exporting(
    tmp_path: Path, random_arrays: Any, fields: dict[str, Any], write: Any, write_tokenizer: Files
) -> None:
    fields["vocab_size"] = 300
    folder = write(fields, random_arrays(fields))
    write_tokenizer(folder)
    model = load(folder)
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.tokenizer("héllo wörld")["input_ids"] == model.tokenizer("héllo wörld")["input_ids"]
    assert load(folder, tokenizer=False).tokenizer is None


def test_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path, CONFIG) is None


@pytest.mark.parametrize("left", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer(tmp_path: Path, write_tokenizer: Files, left: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / ({"vocab.json", "merges.txt"} - {left}).pop()).unlink()
    with pytest.raises(InputError, match=rf"has {left} alone of the tokenizer; expected vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path, CONFIG)


@pytest.mark.parametrize("damage", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_damaged_files(tmp_path: Path, write_tokenizer: Files, damage: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / damage).write_text("{garbage")
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path, CONFIG)


def test_code_of_the_folder_is_not_run(tmp_path: Path, write_tokenizer: Files) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path, CONFIG)
    assert not (tmp_path / "made").exists()


WAYS: dict[str, Callable[[Any, str], Any]] = {
    "tokenizer": lambda model, text: model.tokenizer(text),
    "many texts": lambda model, text: model.tokenizer(["a", text]),
    "generate": lambda model, text: generate(model, ["a", text], 2),
    "stream": lambda model, text: [*stream(model, text, 2)],
    "task": lambda model, text: encode(model.tokenizer, "a", text),
    "tasks": lambda model, text: encode_all(model.tokenizer, [Example("a", "b"), Example(text, "b")]),
    "text": lambda model, text: windows(model.tokenizer, text, 8),
    "lm-eval": lambda model, text: harness(model).tok_encode(text),
    "calibration": lambda model, text: probe(model, [text]),
}


def harness(model: Model) -> Any:
    pytest.importorskip("lm_eval")
    from chai_jax.evaluation.lm_eval import LanguageModel

    return LanguageModel(model)


@pytest.fixture
def short(tmp_path: Path, random_arrays: Any, fields: dict[str, Any], write: Any, write_tokenizer: Files) -> Model:
    """A model with one token less than its tokenizer, which lacks the last: that of the letter \u0143, byte 173."""
    fields["vocab_size"] = 259
    folder = write(fields, random_arrays(fields))
    write_tokenizer(folder)
    return load(folder)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_that_the_model_has_not_is_refused_where_it_is_met(short: Model, way: str) -> None:
    WAYS[way](short, "a b")
    with pytest.raises(InputError, match="a text holds 'Ń', token 259 of the tokenizer; the model has 259: leave"):
        WAYS[way](short, "a \u00ed b")  # bytes 195 and 173
    assert short.tokenizer("")["input_ids"] == [2]


def test_such_a_tokenizer_is_saved_as_what_it_is(tmp_path: Path, short: Model) -> None:
    from transformers import AutoTokenizer

    save(short, tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert type(theirs).__name__ == type(short.tokenizer).__name__
    assert theirs("a b")["input_ids"] == short.tokenizer("a b")["input_ids"]
    assert theirs("\u00ed")["input_ids"][-1] == 259


def test_ids_fit_the_model(tmp_path: Path, write_tokenizer: Files) -> None:
    write_tokenizer(tmp_path)
    tokens = load_tokenizer(tmp_path, CONFIG)(bytes(range(256)).decode("latin-1"))["input_ids"]
    assert np.max(tokens) < CONFIG.vocab_size
