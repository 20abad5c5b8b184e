"""`chai-jax bench-serve`: arithmetic on known times, requests that fall due by themselves, servers that fail."""

import asyncio
import csv
import errno
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chai_jax.bench import load_answers, load_client
from chai_jax.bench.load import Load, Measured, Sending, arrivals
from chai_jax.bench.load_answers import Answer, Events, Request, hear
from chai_jax.bench.load_figures import notes, spread, summary
from chai_jax.bench.load_prompts import Between, made_requests, read_prompts, read_requests
from chai_jax.cli import main
from chai_jax.errors import InputError
from tests.bench.scripted_server import Asked, ScriptedServer

Record = dict[str, Any]
CLOSED = Load(concurrency=1)


def answer(due: float, sent: float, pieces: list[float], end: float, told: int | None = None, **more: Any) -> Answer:
    return Answer(0, 8, due, sent, end, pieces, **{"outcome": "200", "told": told, **more})


# Events


STREAM = b": hi\r\ndata: one\r\n\r\ndata:two\r\ndata: lines\r\n\r\nevent: x\rdata: three\r\r\n\ndata: [DONE]\n\ndata: x"
EVENTS = [b"one", b"two\nlines", b"three", b"[DONE]"]


def test_events_may_be_cut_anywhere() -> None:
    for first, second in itertools.combinations(range(len(STREAM) + 1), 2):
        events = Events()
        found = [
            event for part in (STREAM[:first], STREAM[first:second], STREAM[second:]) for event in events.feed(part)
        ]
        assert found == EVENTS, (first, second)
    events = Events()
    assert [event for at in range(len(STREAM)) for event in events.feed(STREAM[at : at + 1])] == EVENTS


@pytest.mark.parametrize("part", [b"data: " + b"x" * 99, b"data: x\n", b"x" * 99])
def test_an_event_without_an_end_is_not_kept(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_answers, "LONGEST_EVENT", 10_000)
    events = Events()

    def feed() -> None:
        for _ in range(2000):
            events.feed(part)

    with pytest.raises(ValueError, match="more than 10,000 bytes"):
        feed()


def test_many_events_may_be_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_answers, "LONGEST_EVENT", 100)
    events = Events()
    assert sum(len(events.feed(b"data: some text\n\n")) for _ in range(100)) == 100


def test_what_is_heard() -> None:
    """Text of completions and chats; usage from the last event that has it; a role alone is no text."""
    heard = answer(0, 0, [], 0, None, outcome="unfinished")
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": {"completion_tokens": 0}},
        {"choices": [{"delta": {"content": "a"}, "finish_reason": None}], "usage": None},
        {"choices": [{"text": "b"}]},
        {"choices": [{"delta": {"reasoning_content": "c"}}], "usage": {"prompt_tokens": 5, "completion_tokens": 3}},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}},
    ]
    for at, event in enumerate(events):
        assert not hear(heard, json.dumps(event).encode(), float(at))
    assert hear(heard, b"[DONE]", 9.0)
    assert (heard.pieces, heard.finish, heard.prompt_tokens, heard.tokens) == ([1.0, 2.0, 3.0], "stop", 5, 9)


@pytest.mark.parametrize("event", [b"no", b"[1]", b"\xff", b'{"error": {"message": "of the server"}}', b"[" * 10**5])
def test_what_cannot_be_heard(event: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        hear(answer(0, 0, [], 0), event, 0.0)


@pytest.mark.parametrize("event", [b"{}", b'{"choices": 3}', b'{"choices": [[]]}', b'{"choices": [{"delta": 4}]}'])
def test_what_says_nothing(event: bytes) -> None:
    heard = answer(0, 0, [], 0)
    assert not hear(heard, event, 0.0)
    assert heard.pieces == []


def test_more_text_than_was_asked_for_is_not_heard_for_ever() -> None:
    heard, event = answer(0, 0, [], 0), b'{"choices": [{"text": "x"}]}'
    for at in range(96):
        hear(heard, event, float(at))
    with pytest.raises(ValueError, match="96 pieces of text for 8 tokens"):
        hear(heard, event, 96.0)


# Arithmetic


def test_durations_count_from_when_a_request_was_due() -> None:
    late = answer(due=10.0, sent=12.0, pieces=[13.0, 14.0, 16.0], end=17.0, told=5)
    assert (late.first, late.latency, late.gaps, late.per_token) == (3.0, 7.0, [1.0, 2.0], 0.75)
    assert (late.tokens, answer(0, 0, [1.0, 2.0], 3.0).tokens) == (5, 2)
    row = late.to_json(4.0)
    assert (row["due"], row["late"], row["first"], row["latency"], row["longest_gap"]) == (6.0, 2.0, 3.0, 7.0, 2.0)
    assert (row["counted"], answer(0, 0, [], 1).to_json(0)["counted"]) == ("usage", "pieces")
    silent = answer(0.0, 0.0, [], 2.0, told=0)
    assert (silent.first, silent.per_token, silent.gaps) == (2.0, None, [])


def test_percentiles() -> None:
    found = spread([at / 1000 for at in range(101)])
    assert found == pytest.approx({"n": 101, "mean": 50.0, "p50": 50.0, "p95": 95.0, "p99": 99.0})
    assert spread([0.002])["p99"] == pytest.approx(2.0)
    assert spread([]) == {"n": 0, "mean": None, "p50": None, "p95": None, "p99": None}


def test_rates_are_over_the_whole_span_and_of_good_answers() -> None:
    answers = [
        answer(10.0, 10.0, [11.0, 12.0], 12.0, told=6, prompt_tokens=30, finish="length"),
        answer(11.0, 11.0, [13.0], 15.0, told=4, prompt_tokens=10, finish="stop"),
        answer(12.0, 12.0, [], 20.0, outcome="503", message="full"),
        answer(13.0, 13.0, [14.0], 0.0, outcome="unfinished"),
    ]
    found = summary(Load(rate=1.0, requests=5), Measured(9.0, answers, 3, 1, 4, [0.001], 2.0), False)
    assert (found["seconds"], found["requests_per_second"]) == (10.0, 0.2)
    assert (found["new_tokens_per_second"], found["prompt_tokens_per_second"]) == (1.0, 4.0)
    assert found["outcomes"] == {"200": 2, "503": 1, "unfinished": 1}
    assert (found["asked"], found["sent"], found["answered"], found["most_at_once"]) == (5, 4, 2, 4)
    assert (found["first_token_ms"]["n"], found["first_token_ms"]["mean"]) == (2, 1500.0)
    assert (found["latency_ms"]["mean"], found["gap_ms"]["n"], found["per_token_ms"]["mean"]) == (3000.0, 1, 200.0)
    assert (found["client_cpu"], found["client_limited"], found["messages"]) == (0.2, False, {"503": "full"})
    told = " ".join(found["notes"])
    assert "4 of 5 requests were sent" in told
    assert "2 of 4 requests were not answered to the end: 503 x 1, unfinished x 1" in told
    assert "503: full" in told


def test_who_counted_the_tokens_is_said() -> None:
    found = summary(CLOSED, Measured(0.0, [answer(0, 0, [1.0, 2.0], 2.0), answer(0, 0, [1.0], 4.0, told=3)]), False)
    assert found["counted_by"] == {"pieces": 1, "usage": 1}
    assert (found["new_tokens"], found["prompt_tokens"], found["prompt_tokens_per_second"]) == (5, None, None)
    assert any("did not say how many tokens 1 of 2 answers have" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("late", "loop", "cpu", "limited"),
    [(0.0, 0.0, 0.5, False), (0.02, 0.0, 0.5, True), (0.0, 0.02, 0.5, True), (0.0, 0.0, 0.9, True)],
)
def test_a_client_that_is_too_slow_says_so(late: float, loop: float, cpu: float, limited: bool) -> None:
    answers = [answer(0.0, late, [0.5], 1.0)] * 20
    found = summary(CLOSED, Measured(0.0, answers, 20, 0, 1, [loop] * 20, cpu), False)
    assert found["client_limited"] is limited
    assert any("this client was too slow" in note for note in notes(found)) is limited


def test_nothing_measured_is_no_error() -> None:
    found = summary(CLOSED, Measured(), True)
    assert (found["sent"], found["requests_per_second"], found["first_token_ms"]["n"]) == (0, None, 0)


# Arrivals and requests


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps are exponential: mean and standard deviation are 1/rate, an eighth is shorter than -log(7/8)/rate."""
    times = list(arrivals(Load(rate=5.0, requests=20_000, seed=3)))
    gaps = np.diff([0.0, *times])
    assert len(times) == 20_000
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() == pytest.approx(0.2, rel=0.04)
    assert (gaps < -np.log(7 / 8) / 5).mean() == pytest.approx(1 / 8, rel=0.1)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03


def test_arrivals_follow_from_the_seed_and_end_in_time() -> None:
    one = list(arrivals(Load(rate=2.0, requests=50, seed=1)))
    assert one == list(arrivals(Load(rate=2.0, requests=50, seed=1)))
    assert one != list(arrivals(Load(rate=2.0, requests=50, seed=2)))
    assert [due / 2 for due in one] == pytest.approx(list(arrivals(Load(rate=4.0, requests=50, seed=1))))
    short = list(arrivals(Load(rate=2.0, requests=50, seconds=one[9], seed=1)))
    assert short == one[:10]
    assert len(list(arrivals(Load(rate=1000.0, requests=None, seconds=10.0)))) == pytest.approx(10_000, rel=0.05)


def test_prompts_that_are_made() -> None:
    def first(seed: int, part: int, count: int = 200) -> list[Request]:
        return list(itertools.islice(made_requests(Between(3, 5), Between(2, 4), seed, part), count))

    made = first(0, 1)
    assert {len(one.prompt.split()) for one in made} == {3, 4, 5}
    assert {one.new_tokens for one in made} == {2, 3, 4}
    assert made == first(0, 1)
    assert made != first(0, 2) != first(1, 2)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" one\r\n\ntwo two\n")
    assert read_prompts(tmp_path / "a.txt") == [" one", "two two"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\ntwo", "n": 1}\n\n{"prompt": "three"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["one\ntwo", "three"]
    taken = itertools.islice(read_requests(["a", "b"], Between(1, 1), 0, 1), 5)
    assert [one.prompt for one in taken] == ["a", "b", "a", "b", "a"]
    for text in ('{"prompt": 3}', '{"text": "x"}', "[]", "x", '{"prompt": ""}'):
        (tmp_path / "b.jsonl").write_text('{"prompt": "good"}\n' + text)
        with pytest.raises(InputError, match="no prompt in line 2"):
            read_prompts(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(tmp_path / "c.txt")


@pytest.mark.parametrize("text", ["", "0", "5:4", "1:2:3", "-1:3", "a", "1:", "1:9999999", "٣"])
def test_ranges_that_cannot_be(text: str) -> None:
    with pytest.raises(InputError, match="--new-tokens"):
        Between.read("--new-tokens", text)
    assert Between.read("--new-tokens", "7") == Between(7, 7)


# Sending


class Holding:
    """Answers nobody until `count` have asked at once: only a client that does not wait comes to an end."""

    def __init__(self, count: int):
        self.count, self.asked, self.clock = count, 0, time.monotonic
        self.all_here = asyncio.Event()

    async def ask(self, answer: Answer, request: Request) -> None:
        answer.sent = self.clock()
        self.asked += 1
        if self.asked == self.count:
            self.all_here.set()
        await asyncio.wait_for(self.all_here.wait(), 10)
        answer.outcome, answer.end, answer.pieces = "200", self.clock(), [self.clock()]


def requests() -> Iterator[Request]:
    return itertools.repeat(Request("x", 4))


def test_an_open_load_waits_for_nobody() -> None:
    sending = Sending(Load(rate=1000.0, requests=50, warm_up=0), Holding(50), requests(), requests())
    asyncio.run(sending.run())
    measured = sending.measured
    assert (len(measured.answers), measured.finished, measured.in_flight, measured.most_at_once) == (50, 50, 0, 50)
    due = [one.due - measured.began for one in measured.answers]
    assert due == pytest.approx(list(arrivals(Load(rate=1000.0, requests=50))))
    assert all(one.sent >= one.due for one in measured.answers)


def test_a_load_that_the_client_cannot_send_is_marked() -> None:
    """Each sending holds the event loop for 5 ms, while ten fall due."""

    class Slow(Holding):
        async def ask(self, answer: Answer, request: Request) -> None:
            answer.sent = self.clock()
            time.sleep(0.005)
            answer.outcome, answer.end = "200", self.clock()

    load = Load(rate=2000.0, requests=40, warm_up=0)
    sending = Sending(load, Slow(0), requests(), requests())
    asyncio.run(sending.run())
    found = summary(load, sending.measured, False)
    assert found["client_limited"]
    assert found["late_ms"]["p95"] > 10
    assert found["latency_ms"]["mean"] > found["late_ms"]["mean"]  # what was sent late is counted as slow


@pytest.mark.parametrize("size", [1, 3])
def test_a_closed_load_is_never_more_at_once(size: int) -> None:
    async def script(asked: Asked) -> None:
        await asked.say(2, 2, pause=0.001)

    with ScriptedServer(script) as server:
        found = run(server, "--concurrency", size, "--requests", 20, "--warm-up", 0)
    assert server.most == found["most_at_once"] == size
    assert (found["sent"], found["answered"], len(server.asked)) == (20, 20, 20)
    assert server.connections == 1 + size  # one looks whether anybody listens; the others serve request after request


def test_the_time_is_up() -> None:
    class Quick(Holding):
        async def ask(self, answer: Answer, request: Request) -> None:
            answer.sent = self.clock()
            await asyncio.sleep(0.01)
            answer.outcome, answer.end = "200", self.clock()

    sending = Sending(Load(concurrency=2, requests=None, seconds=0.1, warm_up=0), Quick(0), requests(), requests())
    asyncio.run(asyncio.wait_for(sending.run(), 10))
    assert 2 <= len(sending.measured.answers) == sending.measured.finished <= 22


# The command


def run(server: ScriptedServer, *argv: Any, status: int = 0) -> Record:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        assert main(["bench-serve", server.address, "--model", "tiny", *map(str, argv)]) == status
    return json.loads(printed[-1]) if printed else {}


def refused(capsys: pytest.CaptureFixture[str], address: str, *argv: Any) -> str:
    assert main(["bench-serve", address, "--model", "tiny", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


async def three(asked: Asked) -> None:
    """Six tokens in three pieces."""
    await asked.say(3, 6)


def test_what_is_asked_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rate", "200", "--requests", "20", "--new-tokens", "4:9", "--prompt-tokens", "5", "--warm-up", "3"]
    out = tmp_path / "out"
    with ScriptedServer(three) as server:
        assert main(["bench-serve", server.address, "--model", "tiny", *words, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    told = json.loads(text.splitlines()[-1])
    assert "time to first token, ms" in text
    assert (told["sent"], told["answered"], told["new_tokens"], told["prompt_tokens"]) == (20, 20, 120, 140)
    assert (told["outcomes"], told["finishes"], told["counted_by"]) == ({"200": 20}, {"length": 20}, {"usage": 20})
    assert [told[name]["n"] for name in ("first_token_ms", "per_token_ms", "gap_ms", "latency_ms")] == [20, 20, 40, 20]
    assert told["first_token_ms"]["p50"] <= told["latency_ms"]["p50"]

    assert len(server.asked) == 23
    bodies = [one.body for one in server.asked]
    assert {one.path for one in server.asked} == {"/v1/completions"}
    assert {len(body["prompt"].split()) for body in bodies} == {5}
    assert {body["max_tokens"] for body in bodies} <= {4, 5, 6, 7, 8, 9}
    assert len({body["prompt"] for body in bodies}) == 23
    assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in bodies)
    assert all(body["model"] == "tiny" and body["temperature"] == 0 for body in bodies)

    whole = json.loads((out / "load.json").read_text())
    assert {name: whole[name] for name in told} == told
    assert whole["settings"]["rate"] == 200
    with (out / "load.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(whole["answers"]) == 20
    assert sorted(int(line["asked_tokens"]) for line in lines) == sorted(body["max_tokens"] for body in bodies[3:])
    assert {(line["outcome"], line["new_tokens"], line["pieces"]) for line in lines} == {("200", "6", "3")}
    assert [float(line["due"]) for line in lines] == pytest.approx(
        list(arrivals(Load(rate=200.0, requests=20))), abs=1e-6
    )


def test_chats_keys_and_other_fields(tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\nthree\n")
    more = ["--chat", "--api-key", "sesame", "--extra", '{"ignore_eos": true, "temperature": null}', "--out", out]
    with ScriptedServer(three) as server:
        run(server, "--concurrency", 1, "--requests", 3, "--prompts", prompts, *more)
    assert {one.path for one in server.asked} == {"/v1/chat/completions"}
    assert {one.headers["authorization"] for one in server.asked} == {"Bearer sesame"}
    said = [one.body["messages"] for one in server.asked]
    assert said == [[{"role": "user", "content": text}] for text in ("one", "two", "three", "one")]
    assert all(one.body["ignore_eos"] and "temperature" not in one.body for one in server.asked)
    assert all("sesame" not in path.read_text() for path in out.iterdir())


def test_a_hundred_and_fifty_at_once_are_not_throttled() -> None:
    here: list[Asked] = []

    async def script(asked: Asked) -> None:
        here.append(asked)
        while len(here) < 150:
            await asyncio.sleep(0.01)
        await asked.say(1, 1)

    with ScriptedServer(script) as server:
        found = run(server, "--rate", 1000, "--requests", 150, "--warm-up", 0, "--timeout", 20)
    assert server.most == found["most_at_once"] == found["answered"] == 150


def test_refusals_are_counted() -> None:
    async def script(asked: Asked) -> None:
        if asked.number % 2:
            await asked.refuse(503, {"error": {"message": "the queue\nis full"}})
        else:
            await asked.say(2, 2)

    with ScriptedServer(script) as server:
        found = run(server, "--rate", 500, "--requests", 20, "--warm-up", 0)
    assert found["outcomes"] == {"200": 10, "503": 10}
    assert found["messages"] == {"503": "the queue is full"}
    assert found["latency_ms"]["n"] == found["answered"] == 10
    assert found["new_tokens"] == 20


async def cut(asked: Asked) -> None:
    await asked.begin()
    await asked.event({"choices": [{"text": "x"}]})
    asked.writer.close()


async def silent(asked: Asked) -> None:
    await asked.begin()
    await asyncio.sleep(30)


async def endless(asked: Asked) -> None:
    await asked.begin()
    while True:
        await asked.event({"choices": [{"text": "x"}]})


async def unsure(asked: Asked) -> None:
    await asked.begin()
    await asked.event({"choices": [{"text": "x"}]})
    await asked.event({"error": {"message": "the engine failed"}})
    await asked.finish()


async def unstreamed(asked: Asked) -> None:
    await asked.refuse(200, {"choices": [{"text": "x", "finish_reason": "stop"}]})


async def gone(asked: Asked) -> None:
    asked.writer.close()


async def nonsense(asked: Asked) -> None:
    asked.writer.write(b"\x00\xff no HTTP\r\n\r\n")
    asked.writer.close()


WRONG = {
    cut: ("broken off", ""),
    silent: ("timed out", "not done in 0.3 s"),
    endless: ("broken off", "pieces of text for"),
    unsure: ("broken off", "the engine failed"),
    unstreamed: ("broken off", "without [DONE]"),
    gone: ("broken off", ""),
    nonsense: ("broken off", ""),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda script: script.__name__)
def test_answers_that_do_not_come_to_their_end(wrong: Any) -> None:
    async def script(asked: Asked) -> None:
        await (wrong if asked.number % 2 else three)(asked)

    with ScriptedServer(script) as server:
        more = ["--timeout", 0.3] if wrong is silent else []
        found = run(server, "--concurrency", 1, "--requests", 4, "--warm-up", 0, *more)
    outcome, message = WRONG[wrong]
    assert found["outcomes"] == {"200": 2, outcome: 2}
    assert message in found["messages"].get(outcome, "")
    assert found["new_tokens"] == 12


def test_files_that_run_out_are_the_clients_fault() -> None:
    """However deep the libraries below wrap it."""

    def wrapped(number: int) -> Exception:
        outer = RuntimeError("no connection")
        outer.__cause__ = ExceptionGroup("all failed", [ValueError(), OSError(number, "x")])
        return outer

    assert load_client._out_of_descriptors(wrapped(errno.EMFILE))
    assert not load_client._out_of_descriptors(wrapped(errno.ECONNREFUSED))


def test_an_end_without_done_is_one() -> None:
    async def script(asked: Asked) -> None:
        await asked.begin()
        await asked.event({"choices": [{"text": "x", "finish_reason": "stop"}]})
        await asked.send(b"")

    with ScriptedServer(script) as server:
        found = run(server, "--concurrency", 1, "--requests", 2)
    assert (found["answered"], found["counted_by"], found["finishes"]) == (2, {"pieces": 2}, {"stop": 2})


def test_a_server_that_never_answers_well(capsys: pytest.CaptureFixture[str]) -> None:
    async def script(asked: Asked) -> None:
        await asked.refuse(400, {"error": {"message": "stream_options is \x1b[31munknown"}})

    with ScriptedServer(script) as server:
        line = refused(capsys, server.address, "--concurrency", 2, "--requests", 4)
    assert "400 x 4" in line
    assert "stream_options is" in line
    assert "\x1b" not in line
    assert len(server.asked) == 5


@pytest.mark.parametrize("warm_up", [0, 1])
@pytest.mark.parametrize("how", [("--rate", "500"), ("--concurrency", "2")])
def test_an_unknown_model_is_asked_for_once(
    warm_up: int, how: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(asked: Asked) -> None:
        await asked.refuse(404, {"error": {"message": f"no model {asked.body['model']}", "type": "x"}})

    with ScriptedServer(script) as server:
        line = refused(capsys, server.address, *how, "--requests", 1000, "--warm-up", warm_up)
    assert "404 (no model tiny)" in line
    assert "--model" in line
    assert len(server.asked) < 100


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        line = refused(capsys, f"http://127.0.0.1:{port}/v1", "--rate", 4)
    assert f"nobody listens at 127.0.0.1:{port}" in line


BAD = {
    "give one of --rate": [],
    "give one of --rate (": ["--rate", 1, "--concurrency", 1],
    "--rate is 0.0": ["--rate", 0],
    "--rate is nan": ["--rate", "nan"],
    "--concurrency is 0": ["--concurrency", 0],
    "--requests is 0": ["--rate", 1, "--requests", 0],
    "--seconds is -1.0": ["--rate", 1, "--seconds", -1],
    "--rate times --seconds": ["--rate", 1e5, "--seconds", 1e5],
    "--warm-up is -1": ["--rate", 1, "--warm-up", -1],
    "--seed is -1": ["--rate", 1, "--seed", -1],
    "--timeout is 0.0": ["--rate", 1, "--timeout", 0],
    "--new-tokens is '0'": ["--rate", 1, "--new-tokens", 0],
    "--prompts and --prompt-tokens": ["--rate", 1, "--prompts", "x.txt", "--prompt-tokens", "1"],
    "cannot read": ["--rate", 1, "--prompts", "there-is-none.txt"],
    "--extra is '[]'": ["--rate", 1, "--extra", "[]"],
    "--extra is '{": ["--rate", 1, "--extra", '{"stream": false}'],
    "--api-key": ["--rate", 1, "--api-key", "a b\n"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "http://127.0.0.1:9/v1", *BAD[message])


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:8000", "ftp://x/v1", "http://", "http://a b/", "http://x:99999", "http://u:p@x/v1", "http://["],
)
def test_bad_addresses(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the address is" in refused(capsys, address, "--rate", 1)


def test_addresses() -> None:
    assert load_client.base_of("http://127.0.0.1:1/v1/") == "http://127.0.0.1:1/v1"
    assert load_client.base_of("https://x") == "https://x/v1"
    assert load_client.base_of("http://[::1]:80/a/b") == "http://[::1]:80/a/b"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_until_ctrl_c_is_reported(number: int, tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        if asked.number < 5:
            await asked.say(1, 1)
        elif asked.number == 7:
            await asyncio.sleep(1)  # until the client has heard all five
            os.kill(os.getpid(), number)
        else:
            await asyncio.sleep(60)

    with ScriptedServer(script) as server:
        found = run(server, "--rate", 200, "--requests", 500, "--warm-up", 0, "--out", tmp_path / "out")
    assert found["interrupted"]
    assert (found["answered"], found["outcomes"]["200"]) == (5, 5)
    assert 8 <= found["sent"] == found["answered"] + found["outcomes"]["unfinished"] < 500
    assert any("stopped early: 5 answers" in note for note in found["notes"])
    assert len(json.loads((tmp_path / "out/load.json").read_text())["answers"]) == found["sent"]
