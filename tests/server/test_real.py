"""The server before a real model: its texts are those of `generate`, under mixed load, and to the last request.

The slow ones take minutes with CHAI_JAX_TEST_AS_USER=1, and without it much longer: XLA does not optimise then.
"""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest

from chai_jax.cli import main
from chai_jax.commands import serving
from chai_jax.compress.quantize import with_storage
from chai_jax.files.store import load
from chai_jax.machine.memory import free_bytes, parse_bytes
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.model.sharding import one_device
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.serve.engine import Engine
from chai_jax.serve.generate import generate_tokens
from chai_jax.server.text import TokenTexts

openai = pytest.importorskip("openai")


def test_texts_are_those_of_generate(fake: ModuleType, start: Callable[..., Any]) -> None:
    """A small random model behind the address, its cache in few bits: streamed or whole, one choice or several."""
    config = Architecture(fake.BYTES + 256, 32, 2, 4, 64, 128, 32)
    spec = Spec.dense(2, 4, 8, "k4v4")
    params = init(config, spec, jax.random.key(0), std=0.2)
    execution = Execution.choose("float32", one_device())
    small = Model(config, spec, params, fake.ByteTokenizer(), execution=execution)
    served = Engine(small, 1 << 24, 128, most_slots=4)
    served.start(warm=False)
    server = start(served, name="small")
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "small", "max_tokens": 20, "prompt": "The film was"}
    tokens = [2, *(fake.BYTES + byte for byte in asked["prompt"].encode())]

    (greedy,) = generate_tokens(small, [tokens], 20)
    answer = client.completions.create(**asked, temperature=0)
    assert answer.choices[0].text == small.tokenizer.decode(greedy, True)
    assert answer.usage.completion_tokens == len(greedy)
    with client.completions.create(**asked, temperature=0, stream=True) as stream:
        assert "".join(event.choices[0].text for event in stream) == answer.choices[0].text
    drawn = client.completions.create(**asked, temperature=1.1, seed=5, n=3)
    expected = generate_tokens(small, [tokens] * 3, 20, temperature=1.1, seed=5)
    assert [each.text for each in drawn.choices] == [small.tokenizer.decode(each, True) for each in expected]
    with pytest.raises(openai.BadRequestError, match="the context is 128 tokens"):
        client.completions.create(**{**asked, "max_tokens": 128})


BAD = {
    "--kv-memory is 'much'; expected a size": ("--kv-memory", "much"),
    "--slots is 0; expected at least 1": ("--slots", "0"),
    "--port is 70000": ("--port", "70000"),
    "--grace is -1.0; expected seconds": ("--grace", "-1"),
    "expected one: --adaptive names the formats": ("--adaptive", "int8,int4", "--storage", "int8"),
    "--adaptive is 'int8,int9'; expected some of": ("--adaptive", "int8,int9"),
    "No such file or directory: 'no/such/file'": ("--api-key", "@no/such/file"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_served(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "toy", *BAD[message]]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1, told
    assert message in told[0]


def test_without_the_libraries_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["serve", "toy"]) == 2
    told = "error: serve needs uvicorn, not installed here; install the extra chai_jax[serve]\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 << 30), ("500MB", 5 * 10**8), ("1.5 gib", 3 << 29), ("1e9", 10**9), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("--kv-memory", text) == size


def test_memory_that_is_free() -> None:
    free = free_bytes()
    assert free is None or 1 << 20 < free < 1 << 45


@pytest.fixture(scope="module")
def model(shared: Path) -> Model:
    """opt-mini, its cache in few bits; or what CHAI_JAX_TEST_SERVED says, in float32.

    A large model's cache of few bits depends on rounding too much to compare texts: one number that is read back as the
    next level changes some more in every layer after it (docs/serving.md).
    """
    how = Execution.choose("float32", one_device())
    folder = os.environ.get("CHAI_JAX_TEST_SERVED")
    if folder:
        return load(folder, storage="float32", execution=how)
    return with_storage(load(shared / "models" / "opt-mini", execution=how), "k4v4")


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    served = Engine(model, 4 << 30, min(1100, model.config.context), most_slots=32, prefixes=2, most_queued=64)
    served.start()
    yield served
    served.close()


def prompts(model: Model, count: int, longest: int, seed: int) -> list[list[int]]:
    """Of 1 to `longest` tokens, short ones oftener; some begin alike."""
    draw = random.Random(seed)
    same = [draw.randrange(4, model.config.vocab_size) for _ in range(longest)]
    made = []
    for number in range(count):
        length = int(longest ** draw.random())
        own = [draw.randrange(4, model.config.vocab_size) for _ in range(length)]
        made.append(same[: length // 2] + own[length // 2 :] if number % 4 == 0 else own)
    return made


def mebibytes() -> tuple[int, int]:
    """Of memory, that this process has now, and has had at most."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize() >> 20, most >> 10


TIE = 0.01  # nats by which a token may be likelier than one that rounding chose instead


def gap(model: Model, made: list[int], told: Any) -> float | None:
    """By how much the server's token was likelier, by what it tells, than `made`'s where they part; None: nowhere."""
    names = TokenTexts(model.tokenizer)
    for place, (ours, theirs) in enumerate(zip_longest(told.tokens, map(names.of, made))):
        if ours != theirs:
            likeliest = told.top_logprobs[place]
            return float(likeliest[ours] - likeliest.get(theirs, -math.inf))
    return None


def compare(model: Model, asked: list[list[int]], new: list[int], found: dict[int, tuple[str, str, Any]]) -> None:
    """Assert that texts are `generate`'s but for ties, and say how many part.

    Args:
        found: of each request its kind, its text, and the likeliest tokens that were told.
    """

    def of(*kinds: str) -> list[int]:
        return [number for number, (kind, *_) in found.items() if kind in kinds]

    def says(number: int, tokens: list[int]) -> bool:
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        return found[number][1].rstrip("\ufffd") == text.rstrip("\ufffd")

    greedy = of("whole", "stream")
    made = generate_tokens(model, [asked[number] for number in greedy], 64)
    expected = {number: tokens[: new[number]] for number, tokens in zip(greedy, made, strict=True)}
    gaps = {number: gap(model, tokens, found[number][2]) for number, tokens in expected.items()}
    parted = {number: one for number, one in gaps.items() if one is not None}
    assert all(says(number, expected[number]) for number in greedy if number not in parted)
    others = [
        number
        for number in of("drawn")
        if not says(number, *generate_tokens(model, [asked[number]], new[number], 0.9, top_p=0.9, seed=number))
    ]
    print(f"greedy: {len(greedy)}, parted by nats: {parted}; drawn: {len(of('drawn'))}, others: {others}")
    assert max(parted.values(), default=0.0) < TIE
    assert len(parted) <= 0.03 * len(greedy)
    assert len(others) <= 0.03 * len(of("drawn"))


@pytest.mark.slow
def test_a_thousand_mixed_requests(
    engine: Engine, model: Model, start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """32 at once; some are refused, some go away in the middle. No answer is lost, nothing is compiled.

    Texts are `generate`'s. Matrix products of one sequence and of many round differently, and so do `generate`'s own of
    other batch sizes: a text may go on differently from where two tokens are as likely, but from nowhere else.
    """
    server = start(engine, name="opt-mini")
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=600)
    asked, draw = prompts(model, 1000, min(1000, model.config.context - 64), seed=0), random.Random(1)
    kinds = [draw.choices(("whole", "stream", "drawn", "gone", "refused"), (55, 20, 10, 10, 5))[0] for _ in asked]
    new = [draw.randrange(1, 65) for _ in asked]
    for number in [number for number, kind in enumerate(kinds) if kind == "drawn"]:
        asked[number], new[number] = (20 * asked[number])[:20], 40  # of one shape, for what they are compared with
    found: dict[int, tuple[str, str, Any]] = {}

    def one(number: int) -> None:
        kind = kinds[number]
        settings: dict[str, Any] = {"model": "opt-mini", "prompt": asked[number], "max_tokens": new[number]}
        drawn = {"temperature": 0.9, "top_p": 0.9, "seed": number}
        settings |= drawn if kind == "drawn" else {"temperature": 0, "logprobs": 3}
        if kind == "refused":
            with pytest.raises(openai.BadRequestError, match="the context is"):
                client.completions.create(**{**settings, "max_tokens": 2000})
            found[number] = kind, "", None
        elif kind in ("stream", "gone"):
            pieces, told = [], SimpleNamespace(tokens=[], top_logprobs=[])
            with client.completions.create(**settings, stream=True) as stream:
                for event in stream:
                    pieces.append(event.choices[0].text if event.choices else "")
                    if event.choices and event.choices[0].logprobs:
                        told.tokens += event.choices[0].logprobs.tokens
                        told.top_logprobs += event.choices[0].logprobs.top_logprobs
                    if kind == "gone":
                        break
            found[number] = kind, "".join(pieces), told
        else:
            choice = client.completions.create(**settings).choices[0]
            found[number] = kind, choice.text, choice.logprobs

    memory = [mebibytes()]
    with jax.log_compiles(), ThreadPoolExecutor(32) as pool:
        for part in (range(500), range(500, 1000)):
            list(pool.map(one, part))
            memory.append(mebibytes())
        compiled = [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()]
    assert compiled == []
    assert len(found) == 1000
    until = time.monotonic() + 30
    while engine.status().running and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.status().running == engine.status().queued == 0
    status = engine.status()
    print(Counter(kinds), "MiB and peak, before, in the middle, and after:", *memory, status)
    assert memory[2][0] - memory[1][0] < 150  # and not by something of every request
    assert status.kv_bytes <= status.kv_limit

    compare(model, asked, new, found)


@pytest.mark.slow
def test_sigterm_in_the_middle_loses_nothing(shared: Path) -> None:
    """Every request that was accepted is answered in full, or told that the server ends."""
    command = [sys.executable, "-m", "chai_jax", "serve", str(shared / "models" / "opt-mini")]
    options = ["--port", "0", "--kv-memory", "64MiB", "--context", "512", "--slots", "4", "--grace", "1"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stdout is not None
    ready = next(line for line in process.stderr if "serving opt-mini at" in line)
    client = openai.OpenAI(base_url=ready.split()[-1], api_key="none", max_retries=0, timeout=120)
    ends: list[str] = []

    def one(number: int) -> None:
        try:
            answer = client.completions.create(
                model="opt-mini", prompt=[number + 5] * 20, max_tokens=400, temperature=0, extra_body={"stop": None}
            )
            assert answer.choices[0].finish_reason in ("length", "stop")
            ends.append("answered")
        except openai.APIStatusError as error:
            ends.append(str(error.status_code))
        except openai.APIConnectionError:
            ends.append("refused")  # after the socket was closed: it was never accepted

    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(one, number) for number in range(24)]
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        for each in asked:
            each.result()
    assert process.wait(60) == 0
    out = process.stdout.read()
    process.stdout.close()
    process.stderr.close()
    print(Counter(ends), out)
    assert len(ends) == 24
    assert set(ends) <= {"answered", "503", "refused"}
    assert ends.count("503") > 0
    assert json.loads(out.splitlines()[-1])["made"] > 0
