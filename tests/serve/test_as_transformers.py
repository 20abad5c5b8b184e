"""Texts equal transformers', whatever the files beside config.json say of stop tokens, first tokens and settings."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chai_jax.cli import main
from chai_jax.compress.cluster import cluster
from chai_jax.errors import InputError
from chai_jax.files.export import export
from chai_jax.files.store import load, save
from chai_jax.model.model import Model
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.serve.generate import generate, generate_tokens, stream
from chai_jax.serve.speculate import speculate, stream_with_draft

PROMPTS = ("a gorgeous , witty film", "Paris is the capital of", "é and 電影", "\n")
NEW = 12
Altered = Callable[..., Path]


class Reference:
    """transformers' model and tokenizer of a folder."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def tokens(self, prompt: str, new: int = NEW) -> list[int]:
        """What a prompt is continued by, greedily."""
        encoded = self.tokenizer(prompt, return_tensors="pt")
        made = self.model.generate(**encoded, max_new_tokens=new, do_sample=False)
        found: list[int] = made[0, encoded["input_ids"].shape[1] :].tolist()
        return found

    def text(self, prompt: str) -> str:
        return str(self.tokenizer.decode(self.tokens(prompt), skip_special_tokens=True))


@pytest.fixture(scope="module")
def free(tiny: Path) -> list[int]:
    """What the first prompt is continued by where nothing stops it."""
    found = Reference(tiny).tokens(PROMPTS[0])
    assert len(found) == NEW
    return found


@pytest.fixture(scope="module")
def at(free: list[int]) -> int:
    """Where in it a token comes that has not come before."""
    return next(at for at in range(2, NEW) if free[at] not in free[:at])


def texts(model: Model, prompt: str) -> set[str]:
    """The texts that all ways of asking give; one, if they agree."""
    (whole,) = generate(model, [prompt], NEW)
    drafted = "".join(piece for piece, _ in stream_with_draft(model, model, prompt, NEW))
    return {whole, "".join(stream(model, prompt, NEW)), drafted}


def assert_same_texts(folder: Path) -> None:
    ours, theirs = load(folder), Reference(folder)
    expected = [theirs.text(prompt) for prompt in PROMPTS]
    assert generate(ours, PROMPTS, NEW) == expected
    assert texts(ours, PROMPTS[0]) == {expected[0]}


# By name: generation_config.json (None: there is no such file) and what config.json says; END stands for a token that
# comes early in `free`.
END = "END"
STOPS: dict[str, tuple[Any, Any]] = {
    "two": ({"eos_token_id": [2, END]}, 2),
    "one": ({"eos_token_id": END}, 2),
    "ids that no text has": ({"eos_token_id": [-1, 2, 10**6, END]}, 2),
    "none": ({"eos_token_id": None}, END),
    "not named": ({"bos_token_id": 2}, END),
    "in config.json": (None, END),
    "in config.json alone is what counts without the file": (None, 2),
}


USUAL = ("one", "in config.json alone is what counts without the file")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in USUAL else pytest.mark.slow) for case in STOPS]
)
def test_stop_tokens(case: str, free: list[int], at: int, altered: Altered) -> None:
    written, configured = json.loads(json.dumps(STOPS[case]).replace(f'"{END}"', str(free[at])))
    folder = altered(generation_config=written, config={"eos_token_id": configured})
    ours, theirs = load(folder), Reference(folder)
    expected = [theirs.tokens(prompt) for prompt in PROMPTS]
    decides = STOPS[case][1] if STOPS[case][0] is None else STOPS[case][0]
    assert expected[0] == free[: at + 1 if END in json.dumps(decides) else NEW]
    encoded = [theirs.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert generate_tokens(ours, encoded, NEW) == expected
    *_, drafted = speculate(ours, ours, encoded[0], NEW)
    assert drafted.tokens == expected[0]
    assert texts(ours, PROMPTS[0]) == {theirs.text(PROMPTS[0])}


def test_a_text_that_may_not_stop_goes_on(free: list[int], at: int, altered: Altered) -> None:
    ours = load(altered(generation_config={"eos_token_id": [2, free[at]]}))
    prompt = ours.tokenizer(PROMPTS[0])["input_ids"]
    assert generate_tokens(ours, [prompt], NEW, stop=False) == [free]


def compressed(model: Model) -> Model:
    layer = LayerPlan((ClusterPlan((0, 1), 0), ClusterPlan((2,), 2), ClusterPlan((3,), 3)))
    return cluster(model, Plan((layer,) * 2, "qkv"))


@pytest.mark.parametrize("write", [export, save], ids=["export", "save"])
def test_what_decides_texts_is_carried_on(
    write: Any, free: list[int], at: int, altered: Altered, tmp_path: Path
) -> None:
    settings = {"eos_token_id": [2, free[at]], "max_new_tokens": 9, "custom": {"a": [1]}}
    folder = altered(generation_config=settings, tokenizer_config={"add_bos_token": False})
    model = load(folder)
    write(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == settings
    expected = [Reference(folder).text(prompt) for prompt in PROMPTS]
    assert [Reference(tmp_path / "out").text(prompt) for prompt in PROMPTS] == expected
    assert generate(load(tmp_path / "out"), PROMPTS, NEW) == expected
    if write is not export:
        write(compressed(model), tmp_path / "small")
        again = load(tmp_path / "small")
        assert again.stop_tokens == (2, free[at])
        assert json.loads((tmp_path / "small/generation_config.json").read_text()) == settings


def test_a_folder_may_ask_for_samples(altered: Altered) -> None:
    """Then a text is drawn unless it is asked for at temperature 0; top_k is transformers' 50 where none is given."""
    ours = load(altered(generation_config={"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": 2}))
    prompt = [ours.tokenizer(PROMPTS[0])["input_ids"]]
    drawn = generate_tokens(ours, prompt, NEW, seed=1)
    assert drawn == generate_tokens(ours, prompt, NEW, temperature=0.7, top_k=50, top_p=0.9, seed=1)
    assert drawn != generate_tokens(ours, prompt, NEW, seed=2)
    assert generate_tokens(ours, prompt, NEW, top_k=1) == generate_tokens(ours, prompt, NEW, temperature=0.0)


def test_settings_that_are_not_obeyed_are_told(altered: Altered, capsys: pytest.CaptureFixture[str]) -> None:
    load(altered(generation_config={"repetition_penalty": 1.3, "num_beams": 1, "suppress_tokens": []}))
    told = " ".join(capsys.readouterr().err.split())
    assert "asks for repetition_penalty 1.3, which is not done here" in told


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": "2"}, "has eos_token_id '2'; expected a token id or a list of them"),
        ({"eos_token_id": [2, [3]]}, "expected a token id or a list"),
        ({"eos_token_id": 2.0}, "has eos_token_id 2.0"),
        ({"do_sample": "yes"}, "expected true or false"),
        ({"do_sample": True, "temperature": "hot"}, "has temperature 'hot'; expected a number"),
        ({"top_k": 2.5}, "expected an integer"),
    ],
)
def test_settings_of_the_wrong_type_are_refused(fields: dict[str, Any], message: str, altered: Altered) -> None:
    with pytest.raises(InputError, match=r"generation_config\.json") as raised:
        load(altered(generation_config=fields))
    assert message in str(raised.value)


def test_a_damaged_file_is_refused(altered: Altered) -> None:
    folder = altered()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json is not JSON"):
        load(folder)


FIRST = {
    "as it is": {},
    "add_bos_token: false": {"add_bos_token": False},
    "no BOS": {"bos_token": None},
    "no BOS, to be added": {"bos_token": None, "add_bos_token": True},
    "an end is added": {"add_eos_token": True},
}


@pytest.mark.parametrize("case", FIRST)
def test_first_tokens(case: str, altered: Altered) -> None:
    assert_same_texts(altered(tokenizer_config=FIRST[case]))


def test_the_first_token_matters(altered: Altered) -> None:
    """Or else the tests above would show nothing."""
    with_it, without = (load(altered(tokenizer_config={"add_bos_token": add})) for add in (True, False))
    differ = [one != two for one, two in zip(generate(with_it, PROMPTS), generate(without, PROMPTS), strict=True)]
    assert all(differ)


def test_a_tokenizer_without_special_tokens(without_special_tokens: Path, torch: ModuleType, tmp_path: Path) -> None:
    """As Galactica's, of which transformers begins an empty text with the model's own BOS."""
    assert_same_texts(without_special_tokens)
    ours, theirs = load(without_special_tokens), Reference(without_special_tokens)
    begun = theirs.model.generate(max_new_tokens=NEW, do_sample=False)[0, 1:]
    assert texts(ours, "") == {theirs.tokenizer.decode(begun)}
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        save(ours, folder) if folder.name == "saved" else export(ours, folder)
        assert [Reference(folder).text(prompt) for prompt in PROMPTS] == [theirs.text(prompt) for prompt in PROMPTS]


def test_a_prompt_that_brings_its_own_first_token_gets_no_second(tiny: Path) -> None:
    ours = load(tiny)
    assert texts(ours, f"</s>{PROMPTS[0]}") == texts(ours, PROMPTS[0])


@pytest.mark.parametrize(("length", "new"), [(128, 1), (120, 9)])
def test_the_last_new_token_needs_no_position(length: int, new: int, tiny: Path, torch: ModuleType) -> None:
    ours, theirs = load(tiny), Reference(tiny)
    prompt = [2, *range(100, 99 + length)]
    made = theirs.model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)
    expected = made[0, length:].tolist()
    assert generate_tokens(ours, [prompt], new) == [expected]
    *_, drafted = speculate(ours, compressed(ours), prompt, new)
    assert drafted.tokens == expected
    for way in (lambda: generate_tokens(ours, [prompt], new + 1), lambda: next(speculate(ours, ours, prompt, new + 1))):
        with pytest.raises(InputError, match="do not fit the model's 128 positions"):
            way()


REFUSED = {
    "half a surrogate pair": (("--prompt", "a \udcff b"), r"--prompt holds '\udcff' at character 2"),
    "a negative seed": (("--seed", "-1"), "seed is -1; expected 0 to 4294967295"),
    "a huge seed": (("--seed", str(2**32)), "seed is 4294967296"),
    "top_k": (("--temperature", "1", "--top-k", "-2"), "top_k is -2"),
    "no tokens": (("--max-new-tokens", "0"), "max_new_tokens is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_the_model_is_read(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = REFUSED[case]
    assert main(["generate", "no-such-folder", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [pytest.param((), marks=pytest.mark.slow), ("--temperature", "0.8", "--top-k", "0", "--seed", str(2**32 - 1))],
)
def test_the_command_says_what_generate_gives(
    options: tuple[str, ...], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tiny), "--prompt", PROMPTS[0], *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    sampling = {"temperature": 0.8, "seed": 2**32 - 1} if options else {}
    assert [found["completion"]] == generate(load(tiny), PROMPTS[:1], 40, **sampling)


def test_texts_that_hold_no_characters_are_refused(tiny: Path) -> None:
    for ask in (lambda text: generate(load(tiny), [text]), lambda text: next(stream(load(tiny), text))):
        with pytest.raises(InputError, match="which is no character"):
            ask("a \ud800")
