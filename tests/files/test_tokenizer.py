"""A folder's tokenizer: OPT's </s> in front, nothing where there is none, and a word where there is half of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.files.tokenizer import load_tokenizer
from chai_jax.model.params import OPTConfig

CONFIG = OPTConfig(300, 12, 2, 3, 20, 16, 12)
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
    model.save(tmp_path / "saved")
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


def test_more_tokens_than_the_model(tmp_path: Path, write_tokenizer: Files) -> None:
    write_tokenizer(tmp_path)
    small = OPTConfig(259, 12, 2, 3, 20, 16, 12)
    with pytest.raises(InputError, match="has 260 tokens, the model 259; expected no more than the model"):
        load_tokenizer(tmp_path, small)


def test_ids_fit_the_model(tmp_path: Path, write_tokenizer: Files) -> None:
    write_tokenizer(tmp_path)
    tokens = load_tokenizer(tmp_path, CONFIG)(bytes(range(256)).decode("latin-1"))["input_ids"]
    assert np.max(tokens) < CONFIG.vocab_size
