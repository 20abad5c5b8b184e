"""A chat's tokens and answers are transformers'; templates that cannot be used have one line."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chai_jax.cli import main
from chai_jax.data import chat
from chai_jax.data.chat import chat_tokens
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.serve.generate import encode_prompt, generate, stream
from chai_jax.serve.speculate import stream_with_draft

Altered = Callable[..., Path]
ROOT = Path(__file__).parents[2]
NEW = 12
PROMPT, SYSTEM = "Is it a good film?", "Be brief: é and 電影."
TURNS = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {"with its own first token": "{{ bos_token }}" + TURNS, "without": TURNS}


def asked(folder: Path, system: str | None) -> tuple[Any, list[int]]:
    """transformers' tokenizer, and its tokens of the chat."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": PROMPT}]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("case", TEMPLATES)
def test_tokens_are_those_of_transformers(case: str, system: str | None, altered: Altered) -> None:
    """The tokenizer puts its first token before other texts, and none here: the template alone decides."""
    folder = altered(tokenizer_config={"chat_template": TEMPLATES[case]})
    model = load(folder)
    _, expected = asked(folder, system)
    found = encode_prompt(model, PROMPT, chat=True, system=system)
    assert found == expected
    assert found.count(2) == (case != "without")
    assert encode_prompt(model, PROMPT)[0] == 2


def test_a_template_in_a_file_of_its_own(altered: Altered) -> None:
    folder = altered()
    (folder / "chat_template.jinja").write_text(TURNS)
    assert encode_prompt(load(folder), PROMPT, chat=True) == asked(folder, None)[1]


@pytest.mark.slow
def test_answers_are_those_of_transformers(altered: Altered, capsys: pytest.CaptureFixture[str]) -> None:
    """In all ways of asking, up to the first of several stop tokens."""
    from transformers import AutoModelForCausalLM

    folder = altered(tokenizer_config={"chat_template": TEMPLATES["without"]})

    def expected(folder: Path) -> tuple[list[int], str]:
        tokenizer, tokens = asked(folder, SYSTEM)
        import torch

        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        made = model.generate(torch.tensor([tokens]), max_new_tokens=NEW, do_sample=False)[0, len(tokens) :]
        return made.tolist(), tokenizer.decode(made, skip_special_tokens=True)

    free, text = expected(folder)
    at = next(at for at in range(2, NEW) if free[at] not in free[:at])
    stopping = altered(
        tokenizer_config={"chat_template": TEMPLATES["without"]},
        generation_config={"eos_token_id": [2, 10**6, free[at]]},
    )
    short, stopped = expected(stopping)
    assert short == free[: at + 1]
    assert len(free) == NEW
    how: dict[str, Any] = {"chat": True, "system": SYSTEM}
    assert generate(load(folder), [PROMPT], NEW, **how) == [text]
    model = load(stopping)
    assert generate(model, [PROMPT, "x"], NEW, **how)[0] == stopped
    heard: list[str] = []
    assert generate(model, [PROMPT], NEW, on_text=heard.append, **how) == ["".join(heard)] == [stopped]
    assert "".join(stream(model, PROMPT, NEW, **how)) == stopped
    assert "".join(piece for piece, _ in stream_with_draft(model, model, PROMPT, NEW, **how)) == stopped
    options = ["--chat", "--system", SYSTEM, "--prompt", PROMPT, "--max-new-tokens", str(NEW)]
    for more in ([], ["--draft", str(stopping)]):
        assert main(["generate", str(stopping), *options, *more]) == 0
        *printed, last = capsys.readouterr().out.splitlines()
        assert "\n".join(printed) == stopped.rstrip("\n")
        assert json.loads(last).items() >= {"prompt": PROMPT, "completion": stopped}.items()
    assert text != generate(load(folder), [PROMPT], NEW)[0]


FOREVER = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ range(9999) | list | length }}{% endfor %}{% endfor %}"
)
BAD: dict[str, tuple[Any, str]] = {
    "none": (None, "has no chat template; expected one in tokenizer_config.json or chat_template.jinja: leave out"),
    "one that fails": ("{{ raise_exception('not for you') }}", "chat template fails (not for you): mend it"),
    "one that refuses a system": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TURNS,
        "chat template fails (no system here)",
    ),
    "no template": ("{% for %}", "chat template fails ("),
    "one that asks for code": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "chat template fails ("),
    "division": ("{{ 1 // 0 }}", "chat template fails ("),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template fails ("),
    "empty": ("{# nothing #}", "the tokenizer's chat template gives no text; expected the conversation"),
    "for ever": (FOREVER, "chat template fails (it takes more than 0.3 seconds): mend it"),
    "several without a default": ([{"name": "tool", "template": TURNS}], "chat template fails ("),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_templates_that_cannot_be_used(
    case: str, altered: Altered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "MOST_SECONDS", 0.3 if case == "for ever" else 60)
    template, message = BAD[case]
    folder = altered(tokenizer_config={"chat_template": template})
    assert main(["generate", str(folder), "--chat", "--system", SYSTEM, "--prompt", PROMPT]) == 2
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert message in line
    assert (captured.out, "Traceback" in captured.err) == ("", False)


def test_rendering_leaves_a_tracer_as_it_was(altered: Altered) -> None:
    import sys

    folder = altered(tokenizer_config={"chat_template": TURNS})
    before = sys.gettrace()
    chat_tokens(load(folder).tokenizer, PROMPT)
    assert sys.gettrace() is before


def test_a_system_without_a_chat(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="a system's message is given without chat; expected both"):
        generate(load(tiny), [PROMPT], system=SYSTEM)
    assert main(["generate", str(tiny), "--system", SYSTEM]) == 2
    assert "--system is given without --chat; expected both: add --chat" in capsys.readouterr().err


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as ../shared/models/smollm2/fetch makes it."""
    folder = ROOT.parent / "env/smollm2"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no {folder}: make it with models/smollm2/fetch of the shared folder")
    return folder


def test_the_template_of_a_real_model(smollm2: Path) -> None:
    for system in (None, SYSTEM):
        tokenizer, expected = asked(smollm2, system)
        assert chat_tokens(tokenizer, PROMPT, system) == expected
        assert tokenizer.decode(expected).startswith("<|im_start|>system\n" + (system or "You are a helpful AI"))


@pytest.mark.slow
def test_a_real_model_answers(smollm2: Path) -> None:
    began = time.monotonic()
    (answer,) = generate(load(smollm2), ["What is the capital of France?"], 24, chat=True)
    assert answer == "The capital of France is Paris."
    assert time.monotonic() - began < 300
