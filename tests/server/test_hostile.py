"""Whatever comes over the wire, the answer is a 4xx that says why, and the next client is served as before."""

import http.client
import json
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

JSON = {"Content-Type": "application/json"}
VALUES: tuple[Any, ...] = (True, -1, 1.5, 10**400, "", "x", [], [[]], [None], {}, {"a": 1}, "\ud800", [{"role": 1}])
NAMES = ("prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs", "stream_options")


@pytest.fixture(scope="module")
def server(start: Callable[..., Any]) -> Any:
    from chai_jax.server import connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "HEAD_SECONDS", 0.5)
        patch.setattr(connection, "TAKE_SECONDS", 0.3)
        yield start(body_bytes=100_000, body_seconds=0.5)


@pytest.fixture(autouse=True)
def unharmed(server: Any) -> Any:
    yield
    status, answer = asked(server, "POST", "/v1/completions", json.dumps({"prompt": "hi"}).encode(), JSON)
    assert (status, answer["choices"][0]["text"]) == (200, "hi#0")
    end = time.monotonic() + 2
    while server.engine.status().running:
        assert time.monotonic() < end
        time.sleep(0.001)


def asked(server: Any, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, Any]:
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        line.request(method, path, body, headers)
        answer = line.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        line.close()


def bodies() -> list[bytes]:
    """Each of them wrong."""
    draw, found = random.Random(0), []
    whole = json.dumps({"prompt": "hello", "max_tokens": 5, "stop": ["a"]}).encode()
    for _ in range(150):
        cut = bytearray(whole[: draw.randrange(len(whole))])
        cut += bytes(draw.randrange(128, 256) for _ in range(draw.randrange(4)))
        found.append(bytes(cut))
    for _ in range(150):
        body = {"prompt": "x", "max_tokens": 5, f"no {draw.random()}": draw.choice(VALUES)}
        found.append(json.dumps(body).encode(draw.choice(["utf-8", "utf-16", "utf-32"])))
    found += [b'{"prompt": ' * draw.randrange(100, 9000) for _ in range(10)]
    found += [b"[" * draw.randrange(1000, 99_000) for _ in range(10)]
    for name in NAMES:
        for value in VALUES:
            wrong = {"prompt": "x", name: value, "a" * draw.randrange(1, 99): None}
            found.append(json.dumps(wrong).encode())
    return found


def test_bodies(server: Any) -> None:
    """450 of them, over connections that are kept."""
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    all_bodies = bodies()
    assert len(all_bodies) == 450
    for number, body in enumerate(all_bodies):
        line.request("POST", ("/v1/completions", "/v1/chat/completions")[number % 2], body, JSON)
        answer = line.getresponse()
        told = json.loads(answer.read())["error"]
        assert answer.status == 400, body
        assert told["type"] == "invalid_request_error"
        assert "\n" not in told["message"]
        assert "Traceback" not in told["message"]
    line.close()


def test_heads(server: Any) -> None:
    body = b'{"prompt": "x"}'
    for method, path, headers, status in (
        ("POST", "/v1/completions", {}, 415),
        ("POST", "/v1/completions", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/completions", {"Content-Type": "application/json; charset=latin-1"}, 415),
        ("POST", "/v1/completions", {**JSON, "Content-Encoding": "gzip"}, 415),
        ("PUT", "/v1/completions", JSON, 405),
        ("DELETE", "/", JSON, 405),
        ("POST", "/v1/nothing", JSON, 404),
        ("GET", "/../../etc/passwd", JSON, 404),
        ("GET", "/v1/models/%00%ff%2e%2e/x", JSON, 404),
        ("POST", "/v1/completions/", JSON, 404),
    ):
        found, told = asked(server, method, path, body, headers)
        assert found == status, (method, path, headers)
        assert set(told["error"]) == {"message", "type", "param", "code"}


def test_bodies_that_are_too_large(server: Any, speak: Callable[..., bytes]) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for length in (b"100001", b"9" * 19, b"9" * 15):  # refused before they come
        assert speak(server.port, head + b"Content-Length: " + length + b"\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    found = speak(server.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 4)
    assert found.startswith(b"HTTP/1.1 413 ")
    status, _ = asked(server, "POST", "/v1/completions", json.dumps({"prompt": "é" * 60_000}).encode(), JSON)
    assert status == 413


def test_bytes_that_are_no_http(server: Any, speak: Callable[..., bytes]) -> None:
    draw = random.Random(1)
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for data in (
        *(draw.randbytes(draw.randrange(1, 300)) + b"\r\n\r\n" for _ in range(20)),
        b"GET / HTTP/x.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        post + b"Content-Length: -5\r\n\r\n{}",
        post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        post + b"Transfer-Encoding: chunked, chunked\r\n\r\n",
        post + b"Transfer-Encoding: gzip\r\n\r\n",
        post + b"a b: c\r\n\r\n",
    ):
        found = speak(server.port, data)
        assert found == b"" or found.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), (data[:80], found[:80])
    # A body that breaks off in the middle: there is nobody to answer.
    assert b" 2" not in speak(server.port, post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")[:12]


def test_half_open_connections(server: Any) -> None:
    """They end by themselves, others are served meanwhile, and bodies that do not come are told so."""
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    beginnings = (b"", b"P", post[:40], post[:-5], post)
    lines = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(60)]
    for line, data in zip(lines, beginnings * 12, strict=True):
        line.sendall(data)
    assert asked(server, "GET", "/health", None, {})[0] == 200
    began = time.monotonic()
    for number, line in enumerate(lines):
        found = line.recv(4096)
        assert found.startswith(b"HTTP/1.1 408 ") if number % 5 == 4 else found == b"", found
        line.close()
    assert time.monotonic() - began < 4


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(server: Any) -> None:
    """After a request that was answered, too."""
    line = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200 OK" in line.recv(4096)
    began = time.monotonic()
    with pytest.raises(ConnectionError):  # noqa: PT012
        while time.monotonic() - began < 4:
            line.sendall(b"G")
            time.sleep(0.05)
    line.close()
    assert time.monotonic() - began < 2


def test_a_client_that_takes_nothing_is_gone(server: Any) -> None:
    """Its texts are cancelled, although it keeps its connection."""
    parameters = {"max_tokens": 2000, "n": 4, "stream": True, "logprobs": 20}
    body = json.dumps({"prompt": "long" * 500, **parameters}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.connect(("127.0.0.1", server.port))
    line.sendall(head % len(body) + body)
    end = time.monotonic() + 10
    while not any(ticket.cancelled for ticket in server.engine.tickets):
        assert time.monotonic() < end
        time.sleep(0.01)
    line.close()
