"""The passkey test: texts hide what they say, answers are judged by their first digits, rows are kept."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chai_jax.data.toy import toy_tokenizer
from chai_jax.errors import InputError
from chai_jax.evaluation.statistics import wilson

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def passkey(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("passkey")


def test_a_text_hides_its_number_once(passkey: ModuleType, tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sentence = len(tokenizer(passkey.FILLER, add_special_tokens=False).input_ids)
    depths, keys = [], set()
    for number in range(40):
        one = passkey.trial(tokenizer, 400, 0, number)
        assert 400 - sentence < len(one.prompt) <= 400
        assert one == passkey.trial(tokenizer, 400, 0, number)
        text = tokenizer.decode(one.prompt, skip_special_tokens=True)
        hidden = passkey.HIDDEN.format(key=one.key)
        assert text.startswith(passkey.TASK)
        assert text.endswith(passkey.QUESTION)
        before, after = text.removeprefix(passkey.TASK).removesuffix(passkey.QUESTION).split(hidden)
        count = (before + after).count(passkey.FILLER)
        assert before + after == passkey.FILLER * count
        assert one.depth == before.count(passkey.FILLER) / count
        depths.append(one.depth)
        keys.add(one.key)
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    assert len(keys) == 40
    assert {len(key) for key in keys} == {5}
    with pytest.raises(InputError, match="hides nothing"):
        passkey.trial(tokenizer, 40, 0, 0)


def test_rows_count_what_is_found_and_are_kept(
    passkey: ModuleType, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An oracle that knows every number, but for every third with a cache of few bits; asked twice, it answers once."""
    tokenizer, asked = toy_tokenizer(), []
    trials: dict[tuple[int, ...], Any] = {}

    def trial(_: Any, length: int, seed: int, number: int) -> Any:
        one = passkey.Trial([3] * (length + number), f"{number:05}", number / 5)
        trials[tuple(one.prompt)] = one
        return one

    def answers(model: Any, prompts: list[list[int]], new: int, temperature: float, batch_size: int) -> list[list[str]]:
        assert (new, temperature) == (passkey.ANSWER, 0.0)
        asked.append(len(prompts))
        keys = [trials[tuple(prompt)].key for prompt in prompts]
        few = any(group.storage == "k2v2" for layer in model.spec.layers for group in layer.groups)
        return [["7", key] if few and int(key) % 3 == 0 else [key, "!"] for key in keys]

    monkeypatch.setattr(passkey, "trial", trial)
    monkeypatch.setattr(passkey, "generate_tokens", answers)
    monkeypatch.setattr(type(tokenizer), "decode", lambda _, tokens, **__: " " + "".join(tokens))
    options = passkey.PasskeyOptions(
        (str(small_model),), storages="k2v2", lengths="40", trials=6, batch_tokens=160, seeds="0", out=tmp_path
    )
    for _ in range(2):
        passkey.passkey(options)
        assert asked == [4, 2, 4, 2]
    dense, few = json.loads((tmp_path / "passkey.json").read_text(encoding="utf-8"))["rows"]
    assert (dense["cache"], dense["right"], dense["token"]) == ("bfloat16", 6, 1)
    assert (few["cache"], few["right"]) == ("k2v2", 4)
    assert few["token"] < 0.3
    assert few["interval"] == list(wilson(4, 6))
    assert few["flips"] == {"right_to_wrong": 2, "wrong_to_right": 0}
    assert "4 of 6, 67 %" in (tmp_path / "passkey.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", [{"lengths": ""}, {"lengths": "1e3"}, {"trials": 0}, {"batch_tokens": 0}])
def test_sizes_are_checked(passkey: ModuleType, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected --lengths"):
        _ = passkey.PasskeyOptions(("m",), **wrong).sizes
