"""Scores equal transformers' and the harness's, whatever a tokenizer puts before a text and whatever ends one."""

import importlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chai_jax.cli import main
from chai_jax.data.batches import encode
from chai_jax.data.tasks import get_task
from chai_jax.data.text import windows
from chai_jax.evaluation.tasks import evaluate_rows, perplexity
from chai_jax.files.store import load
from chai_jax.score.loglikelihood import loglikelihoods

# The harness and what it brings warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

Altered = Callable[..., Path]
TEXT = "Paris is the capital of France , and the film about it is a gorgeous , witty one . \n é and 電影 \n" * 12
FIRST: dict[str, dict[str, Any]] = {
    "as it is": {},
    "add_bos_token: false": {"add_bos_token": False},
    "no BOS": {"bos_token": None},
}


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """The harness logs to the stderr of its first call, which pytest closes with that test."""
    yield
    logging.getLogger("lm_eval").handlers.clear()


@pytest.fixture(params=[*FIRST, "no special tokens"])
def folder(request: pytest.FixtureRequest, altered: Altered) -> Path:
    """`tiny` with another tokenizer."""
    if request.param in FIRST:
        return altered(tokenizer_config=FIRST[request.param])
    found: Path = request.getfixturevalue("without_special_tokens")
    return found


def reference(folder: Path) -> tuple[Any, Any]:
    """transformers' tokenizer and model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


def nats(torch: ModuleType, model: Any, tokens: tuple[int, ...], start: int) -> float:
    """What torch takes the tokens from `start` on to cost."""
    ids = torch.tensor([tokens])
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        return float(model(ids, labels=labels).loss) * (len(tokens) - start)


def test_perplexity(folder: Path, torch: ModuleType) -> None:
    tokenizer, model = reference(folder)
    ids = tokenizer(TEXT)["input_ids"]
    own = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if ids[0] == 2:
        parts = [(2, *own[at : at + 127]) for at in range(0, len(own), 127)]
    else:
        parts = [tuple(own[at : at + 128]) for at in range(0, len(own) - 1, 127)]
    assert len(parts) > 2
    assert parts[0] == tuple(ids[:128])
    ours = load(folder)
    assert [window.tokens for window in windows(ours.tokenizer, TEXT, 128)] == parts
    found = perplexity(ours, TEXT)
    assert found["n"] == len(ids) - 1
    assert found["loss"] == pytest.approx(sum(nats(torch, model, part, 1) for part in parts) / found["n"], rel=1e-5)


def test_a_marked_file_has_the_perplexity_of_the_same_file_unmarked(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for name, mark in (("plain.txt", ""), ("marked.txt", "\ufeff")):
        (tmp_path / name).write_text(mark + TEXT, encoding="utf-8")
        assert main(["evaluate", str(tiny), "--text", str(tmp_path / name)]) == 0
        found += json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert found[0] == found[1]


def test_tasks(folder: Path, torch: ModuleType) -> None:
    tokenizer, model = reference(folder)
    rows = [{"sentence": sentence, "label": 0} for sentence in ("a gorgeous , witty film", "é 電影")]
    found = evaluate_rows(load(folder), get_task("sst2"), rows)
    for row, scores in zip(rows, found.loglikelihoods, strict=True):
        prompt = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
        for answer, score in zip((" negative", " positive"), scores, strict=True):
            tokens, start = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
            assert score == pytest.approx(-nats(torch, model, tuple(tokens), start), abs=1e-4)


PAIRS = [
    ("a film", " positive"),
    ("trailing space ", "film film"),
    ("", " positive film"),
    ("", "</s> film"),
    ("</s>a film", " film"),
    ("a gorgeous film . " * 60, "yes"),
]


@pytest.fixture
def harness() -> Any:
    """`chai_jax.evaluation.lm_eval`, where the harness is installed with what its Hugging Face model wants."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    return importlib.import_module("chai_jax.evaluation.lm_eval")


def hugging_face(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)


def requests(*arguments: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each, task_name="any") for each in arguments]


@pytest.mark.parametrize("case", FIRST)
def test_the_harness_s_hugging_face_model(case: str, harness: Any, altered: Altered) -> None:
    folder = altered(tokenizer_config=FIRST[case])
    theirs, ours = hugging_face(folder), harness.LanguageModel(load(folder))
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id) == (2, 2)
    expected = [total for total, _ in theirs.loglikelihood(requests(*PAIRS), disable_tqdm=True)]
    found = [total for total, _ in ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    longest = ours.max_length
    encoded = [encode(ours.tokenizer, *pair, longest) for pair in PAIRS]
    np.testing.assert_allclose(loglikelihoods(ours.model, encoded)[:, 0], expected, atol=1e-3)
    texts = [(TEXT,), ("a film",), ("</s>a film",), ("",)]
    rolled = theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests(*texts)), rolled, rtol=1e-5)
    asked = [(text, {"until": [], "max_gen_toks": 8}) for text in ("a film", "</s>a film", TEXT)]
    assert ours.generate_until(requests(*asked)) == theirs.generate_until(requests(*asked), disable_tqdm=True)


def test_the_harness_stops_where_the_folder_says(harness: Any, tiny: Path, altered: Altered) -> None:
    asked = requests(("a gorgeous , witty film", {"until": [], "max_gen_toks": 12}))
    (free,) = harness.LanguageModel(load(tiny)).generate_until(asked)
    made = load(tiny).tokenizer(free, add_special_tokens=False)["input_ids"]
    folder = altered(generation_config={"eos_token_id": [2, made[4]]})
    found = harness.LanguageModel(load(folder)).generate_until(asked)
    assert found == hugging_face(folder).generate_until(asked, disable_tqdm=True)
    assert found != [free]


def test_the_harness_works_without_special_tokens(harness: Any, without_special_tokens: Path) -> None:
    """Of such a tokenizer its own Hugging Face model can make nothing: an empty text begins with the model's BOS."""
    ours = harness.LanguageModel(load(without_special_tokens))
    assert (ours.prefix_token_id, ours.eot_token_id) == (2, 2)
    pairs = [*PAIRS, ("   ", "film film")]
    encoded = [encode(ours.tokenizer, *pair, ours.max_length) for pair in pairs]
    found = [total for total, _ in ours.loglikelihood(requests(*pairs), disable_tqdm=True)]
    np.testing.assert_allclose(loglikelihoods(ours.model, encoded)[:, 0], found, atol=1e-4)
    assert ours.loglikelihood_rolling(requests(("",))) == [0.0]
    assert len(ours.generate_until(requests(("", {"until": [], "max_gen_toks": 8})))) == 1


# Refuses a system's message, as some do.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [{"role": "user", "content": "Is it good?"}]


def test_conversations_are_the_harness_s(harness: Any, altered: Altered) -> None:
    folder = altered(tokenizer_config={"chat_template": TEMPLATE})
    theirs, ours = hugging_face(folder), harness.LanguageModel(load(folder))
    answered = [*CHAT, {"role": "assistant", "content": "It is"}]
    for messages, answer in ((CHAT, True), ([{"role": "system", "content": "Be brief."}, *CHAT], True)):
        expected = theirs.apply_chat_template([*messages], answer)
        assert ours.apply_chat_template([*messages], answer) == expected == "<|user|>Is it good?\n<|assistant|>"
    assert ours.apply_chat_template(answered, False) == theirs.apply_chat_template(answered, False)
    assert ours.chat_template(True) == theirs.chat_template(True) == TEMPLATE


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Options for a task of two rows; to read all of the harness's takes eight seconds."""
    from functools import partial

    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    (tmp_path / "data/sst2").mkdir(parents=True)
    rows = [{"sentence": "a film", "label": 0}, {"sentence": "another film", "label": 1}]
    (tmp_path / "data/sst2/validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--tasks", "sst2", "--data-dir", str(tmp_path / "data")]


def test_the_command_asks_in_conversations(
    harness: Any, altered: Altered, few_tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered(tokenizer_config={"chat_template": TEMPLATE})
    logged = ["--apply_chat_template", "--output_path", str(tmp_path / "out"), "--log_samples"]
    assert main(["lm-eval", str(folder), *few_tasks, *logged]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (samples,) = (Path(file) for file in found["files"] if "samples" in file)
    first = json.loads(samples.read_text().splitlines()[0])
    question = "a film\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert first["arguments"]["gen_args_0"] == {"arg_0": f"<|user|>{question}\n<|assistant|>", "arg_1": "negative"}
    ours = load(folder)
    expected = encode(ours.tokenizer, f"<|user|>{question}\n<|assistant|>", "negative")
    score = float(first["filtered_resps"][0][0])
    assert score == pytest.approx(float(loglikelihoods(ours, [expected])[0, 0]), abs=1e-4)


BAD_TEMPLATES: dict[str, tuple[Any, list[str], str]] = {
    "none": (None, [], "has no chat template; expected one in tokenizer_config.json or chat_template.jinja"),
    "one that fails": ("{{ raise_exception('not for you') }}", [], "chat template fails (not for you)"),
    "one that is no template": ("{% for %}", [], "chat template fails ("),
    "none of that name": ([{"name": "tool", "template": TEMPLATE}], ["rag"], "'rag' is not available"),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_templates_that_cannot_be_used(
    case: str, harness: Any, altered: Altered, few_tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    template, names, message = BAD_TEMPLATES[case]
    folder = altered(tokenizer_config={"chat_template": template})
    assert main(["lm-eval", str(folder), *few_tasks, "--apply_chat_template", *names]) == 2
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert message in line
    assert (captured.out, "Traceback" in captured.err) == ("", False)


def test_settings_that_are_no_numbers(harness: Any, tiny: Path) -> None:
    wrapped = harness.LanguageModel(load(tiny))
    for settings in ({"max_gen_toks": "many"}, {"temperature": "hot"}, {"temperature": 1.0, "top_k": "all"}):
        with pytest.raises(harness.InputError, match="a task's generation settings"):
            wrapped.generate_until(requests(("a film", settings)))
