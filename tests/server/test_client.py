"""OpenAI's own client, over a socket, sees what OpenAI's servers would show it."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], fake: ModuleType) -> Any:
    engine = fake.FakeEngine(each=3)
    engine.endings = {"[late]": (0, "late"), "[failed]": (0, "failed"), "[cut]": (7, "cut")}
    return start(engine, api_key="open sesame", seconds=7.0)


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="open sesame", max_retries=0, timeout=10) as found:
        yield found


def test_completions(server: Any, client: Any) -> None:
    found = client.completions.create(model="fake", prompt="naïve 好", max_tokens=50, seed=5)
    assert found.object == "text_completion"
    assert found.model == "fake"
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("naïve 好#0", "stop", None)
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (11, 13, 24)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert sum(usage.cache_formats.values()) == 13
    wanted = server.engine.tickets[-1].wanted
    assert (wanted.seed, wanted.number, wanted.temperature, wanted.top_k, wanted.stop) == (5, 0, 0.0, None, True)
    assert wanted.prompt[0] == 2
    assert server.engine.seconds[-1] == 7.0


def test_what_is_usual(server: Any, client: Any) -> None:
    """16 tokens of a completion; a chat's may fill the context; a seed of its own each time."""
    for _ in range(2):
        client.completions.create(model="fake", prompt="a" * 40)
    one, other = (ticket.wanted for ticket in server.engine.tickets[-2:])
    assert one.max_new_tokens == 16
    assert one.seed != other.seed
    client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}])
    wanted = server.engine.tickets[-1].wanted
    assert wanted.max_new_tokens == server.engine.context - len(wanted.prompt)


def test_length_is_a_reason(client: Any) -> None:
    (choice,) = client.completions.create(model="fake", prompt="abcdef", max_tokens=4).choices
    assert (choice.text, choice.finish_reason) == ("abcd", "length")


def test_several_choices_of_several_prompts(server: Any, client: Any) -> None:
    ids = [server.engine.model.tokenizer(text, False, False)["input_ids"] for text in ("x", "y")]
    for prompt in (["x", "y"], ids):
        found = client.completions.create(model="fake", prompt=prompt, n=2, temperature=0.5, top_p=0.9, seed=1)
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in found.choices] == ["x#0", "x#1", "y#2", "y#3"]
        assert found.usage.completion_tokens == 16
        assert found.usage.prompt_tokens == (4 if prompt == ["x", "y"] else 2)
    asked = server.engine.tickets[-1].wanted
    assert (asked.temperature, asked.top_p, asked.seed) == (0.5, 0.9, 1)


def test_chats(server: Any, client: Any) -> None:
    parts = [{"type": "text", "text": "how"}, {"type": "text", "text": "so?"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "so", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "yes"},
    ]
    asked = "<system>be brief\n<user>how\nso?\n<assistant>so\n<user>yes\n<assistant>"
    found = client.chat.completions.create(model="fake", messages=messages, max_completion_tokens=100, n=2)
    assert [choice.message.content for choice in found.choices] == [asked + "#0", asked + "#1"]
    assert found.choices[0].message.role == "assistant"
    assert found.object == "chat.completion"
    assert found.usage.prompt_tokens == len(asked)
    assert server.engine.tickets[-1].wanted.prompt[0] != 2  # the template alone says what comes first


def test_streams(client: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [*client.completions.create(model="fake", prompt="好吧", max_tokens=30, n=2, **options)]
    texts = dict.fromkeys((0, 1), "")
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert chunk.usage is None
        assert "\ufffd" not in choice.text
        texts[choice.index] += choice.text
    assert texts == {0: "好吧#0", 1: "好吧#1"}
    assert [one.finish_reason for chunk in chunks for one in chunk.choices if one.finish_reason] == ["stop", "stop"]
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (7, 18)
    assert len({chunk.id for chunk in chunks}) == 1


def test_streams_of_chats(client: Any) -> None:
    messages = [{"role": "user", "content": "go"}]
    chunks = [*client.chat.completions.create(model="fake", messages=messages, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "<user>go\n<assistant>#0"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert chunks[0].object == "chat.completion.chunk"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_tokens(server: Any, client: Any, stream: bool) -> None:
    """Nothing of them is sent, what only began like one is, and the engine need not go on."""
    prompt = "one twothree two three four"
    found = client.completions.create(
        model="fake", prompt=prompt, max_tokens=60, stop=["zzz", "two thr"], stream=stream, logprobs=0
    )
    chunks = [*found] if stream else [found]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one twothree "
    assert chunks[-1].choices[0].finish_reason == "stop"
    counted = len("one twothree two thr")
    assert sum(len(chunk.choices[0].logprobs.tokens) for chunk in chunks if chunk.choices[0].logprobs) == counted
    assert server.engine.tickets[-1].cancelled
    if not stream:
        assert found.usage.completion_tokens == counted


def test_probabilities(client: Any) -> None:
    (choice,) = client.completions.create(model="fake", prompt="é!", max_tokens=9, logprobs=2).choices
    told = choice.logprobs
    assert told.tokens == ["\ufffd", "\ufffd", "!", "#", "0", "</s>"]
    assert told.token_logprobs == [-0.5] * 6
    assert told.top_logprobs[0] == {"a": -1.0, "b": -2.0}
    assert told.text_offset == [0, 0, 1, 2, 3, 4]
    messages = [{"role": "user", "content": "é"}]
    found = client.chat.completions.create(model="fake", messages=messages, logprobs=True, top_logprobs=1)
    content = found.choices[0].logprobs.content
    assert len(content) == found.usage.completion_tokens
    assert (content[0].token, content[0].bytes, content[0].logprob) == ("<", [60], -0.5)
    assert [one.token for one in content[0].top_logprobs] == ["a"]
    assert content[6].bytes is None
    plain = client.chat.completions.create(model="fake", messages=messages, logprobs=True, stream=True)
    told = [chunk.choices[0].logprobs for chunk in plain]
    places = [place for one in told if one is not None for place in one.content]
    assert places[0].token == "<"
    assert len(places) == len(content)


def collect(stream: Any, into: list[Any]) -> None:
    into.extend(stream)  # what came before an error stays


def test_what_the_engine_gives_up(server: Any, client: Any) -> None:
    for mark, status, kind in (
        ("[late]", 504, openai.APIStatusError),
        ("[failed]", 500, openai.InternalServerError),
        ("[cut]", 503, openai.InternalServerError),
    ):
        for stream in (False, mark != "[cut]"):
            with pytest.raises(kind) as caught:
                client.completions.create(model="fake", prompt=f"some {mark}", stream=stream)
            assert caught.value.status_code == status
            assert "/" not in caught.value.message
    stream = client.completions.create(model="fake", prompt="1234567890[cut]", stream=True)
    chunks = []
    with pytest.raises(openai.APIError, match="the server is ending"):
        collect(stream, chunks)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "1234567"


def test_a_full_engine_says_when_to_come_again(start: Callable[..., Any], fake: ModuleType) -> None:
    engine = fake.FakeEngine(pace=0.2)
    engine.most_queued = 0
    server = start(engine)
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="too many") as caught:
            client.completions.create(model="fake", prompt="x", n=5)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        assert all(ticket.cancelled for ticket in engine.tickets)


def test_models(client: Any) -> None:
    (found,) = client.models.list().data
    assert (found.id, found.format, found.slots, found.bytes_per_token, found.context) == (
        "fake",
        "k4v4",
        4,
        96.5,
        4096,
    )
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/one")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert caught.value.code == "model_not_found"


def test_keys(server: Any) -> None:
    for key in ("wrong", "open sesame2"):
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()
