"""What a request may say, and how what is not done is refused: by name, with status 400."""

import json
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from chai_jax.serve.job import Wanted
from chai_jax.server.protocol import Asked, encode, read_request, wanted
from chai_jax.server.refusals import Refused

USUAL = {"temperature": 0.0, "top_k": None, "top_p": None}
PROMPT = {"prompt": "hi"}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}


def read(chat: bool = False, usual: dict[str, Any] = USUAL, **parameters: Any) -> Asked:
    body = {**(MESSAGES if chat else PROMPT), **parameters}
    return read_request(json.dumps(body).encode(), chat, "fake", usual)


@pytest.mark.parametrize(
    ("chat", "name", "value"),
    [
        *((chat, "presence_penalty", value) for chat in (False, True) for value in (0.5, False, "0")),
        *((True, name, [1]) for name in ("tools", "functions", "modalities")),
        (True, "response_format", {"type": "json_object"}),
        (True, "tool_choice", "required"),
        (True, "reasoning_effort", "low"),
        (True, "logprobs", 1),
        (True, "top_logprobs", 21),
        (True, "top_logprobs", 2),  # without logprobs
        (True, "prompt", "hi"),
        (True, "best_of", 1),
        (True, "max_completion_tokens", 0),
        (False, "max_completion_tokens", 5),
        (False, "messages", []),
        (False, "logprobs", True),
        (False, "logprobs", 21),
        (False, "logit_bias", {"5": 1}),
        (False, "best_of", 2),
        (False, "echo", True),
        (False, "min_p", 0.1),
        (False, "no_such_thing", None),
        (False, "\ud800", 1),
        (False, "max_tokens", 0),
        (False, "max_tokens", 1.0),
        (False, "max_tokens", True),
        (False, "max_tokens", 10**30),
        (False, "temperature", -0.1),
        (False, "temperature", "hot"),
        (False, "temperature", 10**400),
        (False, "top_p", 0),
        (False, "top_p", 1.1),
        (False, "top_k", -2),
        (False, "n", 0),
        (False, "n", 129),
        (False, "seed", -1),
        (False, "seed", 2**32),
        (False, "stop", ""),
        (False, "stop", ["a"] * 5),
        (False, "stop", ["a", 1]),
        (False, "stop", "a" * 257),
        (False, "stream", 1),
        (False, "stream_options", {"include_usage": True}),  # without stream
        (False, "user", 5),
        (False, "model", 5),
        *((False, "prompt", value) for value in ([], [[]], [""] * 129, ["a", 1], [1, True], [[1], "a"], {}, 1.5)),
    ],
)
def test_what_is_refused_by_name(chat: bool, name: str, value: Any) -> None:
    with pytest.raises(Refused) as caught:
        read(chat, **{name: value})
    assert (caught.value.status, caught.value.param) == (400, name)
    assert len(caught.value.message) < 600
    assert "\n" not in caught.value.message


def test_several_texts_of_one_request_have_a_limit() -> None:
    read(prompt=["a", "b"], n=64)
    with pytest.raises(Refused, match="128 texts at most"):
        read(prompt=["a", "b"], n=65)


@pytest.mark.parametrize(
    "messages",
    [
        *(
            [],
            {},
            "hi",
            [1],
            [{}],
            [{"role": "user"}],
            [{"role": "tool", "content": "x"}],
            [{"role": [], "content": ""}],
        ),
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": "x", "name": "me"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
    ],
)
def test_messages_that_are_refused(messages: Any) -> None:
    with pytest.raises(Refused) as caught:
        read(True, messages=messages)
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b"5",
        b'"x"',
        b"\xff\xfe{\x00}\x00",
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b"[" * 10**5,
        b'{"prompt":' * 10**5,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": Infinity}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_refused(body: bytes) -> None:
    for chat in (False, True):
        with pytest.raises(Refused) as caught:
            read_request(body, chat, "fake", USUAL)
        assert caught.value.status == 400


def test_what_changes_nothing_is_accepted() -> None:
    usual = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "suffix": None, "echo": False}
    assert read(**usual, best_of=3, n=3, user="me", model="fake", stop=None, logprobs=None).count == 3
    usual = {"response_format": {"type": "text"}, "tools": [], "tool_choice": None, "store": False}
    found = read(True, **usual, max_tokens=7, max_completion_tokens=7, logprobs=False)
    assert (found.most, found.alternatives) == (7, None)


def test_who_decides_what_is_drawn() -> None:
    """The request; without a temperature the model's folder."""
    folder = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}

    def drawn(usual: dict[str, Any], **parameters: Any) -> tuple[Any, ...]:
        found = read(usual=usual, **parameters)
        return found.temperature, found.top_k, found.top_p

    assert drawn(folder) == (0.7, 20, 0.8)
    assert drawn(folder, top_p=0.5) == (0.7, 20, 0.5)
    assert drawn(folder, temperature=2) == (2.0, None, None)
    assert drawn(folder, temperature=0, top_p=0.5, top_k=3) == (0.0, None, None)
    assert drawn(USUAL) == (0.0, None, None)
    assert drawn(USUAL, top_p=0.5) == (1.0, None, 0.5)
    assert drawn(USUAL, temperature=1, top_k=0, top_p=1) == (1.0, None, None)


def test_what_the_engine_is_asked_for(fake: ModuleType) -> None:
    model: Any = SimpleNamespace(tokenizer=fake.ByteTokenizer(), config=SimpleNamespace(vocab_size=260))
    asked = read(prompt=["a", ""], n=2, max_tokens=3, seed=9, temperature=0.5, logprobs=4)
    prompts = encode(asked, model, "fake")
    assert prompts == [(2, 4 + 97), (2,)]
    found = wanted(asked, prompts, 50)
    same = {"max_new_tokens": 3, "temperature": 0.5, "seed": 9, "alternatives": 4}
    assert found == [Wanted(prompts[at // 2], number=at, **same) for at in range(4)]
    (only,) = wanted(read(True), [(5,) * 49], 50)
    assert (only.max_new_tokens, only.alternatives) == (1, 0)


def test_prompts_that_cannot_be_encoded(fake: ModuleType) -> None:
    tokenizer = fake.ByteTokenizer()
    model: Any = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(vocab_size=260), source="/secret/place")
    refuse = [{"role": "user", "content": "refuse me"}]
    for asked, said in (
        (read(prompt=[260]), "outside 0 to 259"),
        (read(prompt=[-1]), "outside 0 to 259"),
        (read(prompt="a\ud800"), "no character"),
        (read(True, messages=refuse), "roles must alternate"),
    ):
        with pytest.raises(Refused, match=said) as caught:
            encode(asked, model, "fake")
        assert caught.value.status == 400
    tokenizer.chat_template = None
    with pytest.raises(Refused, match="no chat template") as caught:
        encode(read(True), model, "fake")
    assert "secret" not in caught.value.message
