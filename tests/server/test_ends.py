"""Clients that go away free their slots; a server that is told to end lets what runs end, or tells it."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def post(port: int, **body: Any) -> socket.socket:
    """A connection on which a completion was asked for."""
    data = json.dumps({"prompt": "word " * 100, "max_tokens": 500, **body}).encode()
    line = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    line.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + data)
    return line


def rest(line: socket.socket) -> bytes:
    found = b""
    while piece := line.recv(65536):
        found += piece
    line.close()
    return found


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], fake: ModuleType) -> Any:
    return start(fake.FakeEngine(pace=0.02))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [True, False])
def test_a_client_that_goes_away(server: Any, stream: bool, queued: bool) -> None:
    """Running or waiting, all of its choices; and what others asked for goes on."""
    count = len(server.engine.tickets)
    before = [post(server.port, n=4)] if queued else []
    until(lambda: len(server.engine.tickets) == count + 4 * queued)
    other = post(server.port, max_tokens=5, stream=stream, n=2)
    line = post(server.port, stream=stream, n=2)
    until(lambda: len(server.engine.tickets) == count + 4 * queued + 4)
    if stream and not queued:
        assert b"data: " in line.recv(4096) + line.recv(4096)
    line.close()
    mine = server.engine.tickets[-2:]
    until(lambda: all(ticket.cancelled for ticket in mine))
    assert not any(ticket.cancelled for ticket in server.engine.tickets[count:-2])
    for one in before:
        one.close()
    answer = rest(other)
    assert b"word" in answer or stream
    assert b'"length"' in answer
    until(lambda: server.engine.status().running == 0)


def test_what_is_counted(server: Any) -> None:
    def told() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            return str(answer.read().decode())

    rest(post(server.port, max_tokens=3))
    line = post(server.port, stream=True)
    line.recv(4096)
    line.close()
    rest(post(server.port, n=0))
    route = 'route="/v1/completions"'
    until(lambda: f'chai_jax_http_requests_total{{{route},status="499"}}' in told())
    until(lambda: f'chai_jax_http_requests_total{{{route},status="400"}} 1.0' in told())
    found = dict(line.rsplit(" ", 1) for line in told().splitlines() if not line.startswith("#"))
    assert float(found[f'chai_jax_http_requests_total{{{route},status="200"}}']) >= 1
    assert float(found["chai_jax_generated_tokens_total"]) == server.engine.status().made
    assert float(found["chai_jax_prefix_reused_tokens_total"]) == 3
    assert float(found["chai_jax_slots"]) == 4
    assert float(found["chai_jax_cache_bytes"]) == 4 << 20
    assert found['chai_jax_cache_format{format="k4v4"}'] == "1.0"
    assert float(found["chai_jax_time_to_first_token_seconds_count"]) >= 2
    each = float(found["chai_jax_time_per_token_seconds_sum"]) / float(found["chai_jax_time_per_token_seconds_count"])
    assert 0.01 < each < 1
    assert "chai_jax_requests_queued" in found


def test_health_tells_when_it_ends(server: Any) -> None:
    address = f"http://127.0.0.1:{server.port}/health"
    with urllib.request.urlopen(address) as answer:
        assert json.load(answer) == {"status": "ok"}
    server.desk.closing = True
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(address)
    with caught.value as error:
        assert error.code == 503
    assert b"503 Service Unavailable" in rest(post(server.port))
    server.desk.closing = False


def test_sigterm() -> None:
    """No new requests; what can end within the grace ends, the rest is told, and the exit status is 0."""
    command = [sys.executable, str(Path(__file__).with_name("fake.py")), "0", "0.01", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        ready = process.stderr.readline()
        assert ready.startswith("serving fake at http://127.0.0.1:")
        port = int(ready.split(":")[-1].split("/")[0])
        idle = socket.create_connection(("127.0.0.1", port))
        short, whole = post(port, max_tokens=60, stream=True), post(port, max_tokens=500)
        long = post(port, stream=True)
        for line in (short, long):
            assert b"data: " in line.recv(4096) + line.recv(4096)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        until(lambda: refuses(port))
        assert rest(idle) == b""
        assert b'"finish_reason": "length"' in (answer := rest(short))
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b"the server is ending" in (answer := rest(long))
        assert b"data: [DONE]" in answer
        assert rest(whole).startswith(b"HTTP/1.1 503 ")
        out, complaints = process.communicate(timeout=20)
        assert (process.returncode, out, complaints) == (0, "ended\n", "")
        assert time.monotonic() - began < 10
    finally:
        process.kill()
        process.wait()


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionError:
        return True
    return False


def test_a_port_that_is_taken(server: Any, fake: ModuleType) -> None:
    from chai_jax.errors import InputError
    from chai_jax.server.run import is_private, serve
    from chai_jax.server.settings import ServerSettings

    for host, port in (("127.0.0.1", server.port), ("no such host", 0), ("203.0.113.7", 0), ("127.0.0.1", 70_000)):
        engine = fake.FakeEngine()
        with pytest.raises(InputError, match="cannot listen at"):
            serve(engine, ServerSettings("fake", host=host, port=port))
        assert not engine._thread.is_alive()
    assert [is_private(host) for host in ("localhost", "::1", "127.0.0.5", "0.0.0.0", "example.org")] == [True] * 3 + [
        False,
        False,
    ]
