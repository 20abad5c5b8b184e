"""A client of OpenAI-compatible servers: sends a request and times what it hears."""

import asyncio
import errno
import importlib.util
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from chai_jax.bench.load_answers import (
    BROKEN,
    MESSAGE,
    NO_CONNECTION,
    NO_DESCRIPTORS,
    TIMEOUT,
    UNFINISHED,
    Answer,
    Events,
    Request,
    hear,
    message_of,
)
from chai_jax.errors import InputError
from chai_jax.inputs.reading import Record, reason

LONGEST_REFUSAL = 2**16  # bytes of it that are read
PATIENCE = 10.0  # seconds in which an address must take a first connection
LINGER = 1.0  # seconds to wait for the end of a body whose text has ended
KEEP_IDLE = 2.0  # seconds; servers close idle connections after 5 and more, and must not do so while one is taken up


@dataclass(frozen=True)
class Server:
    """Whom to ask, and for what.

    Attributes:
        base: the address up to `/completions`.
        extra: further fields of every request; null takes one of ours away.
        timeout: seconds after which the client gives a request up.
    """

    base: str
    model: str
    chat: bool = False
    api_key: str | None = None
    extra: Record = field(default_factory=dict)
    timeout: float = 600.0

    @property
    def url(self) -> str:
        return f"{self.base}/{'chat/' if self.chat else ''}completions"

    def body(self, request: Request) -> bytes:
        """A request as JSON: greedy and streamed, with the numbers of tokens at the end."""
        said = {"messages": [{"role": "user", "content": request.prompt}]} if self.chat else {"prompt": request.prompt}
        ours = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        whole = {"model": self.model, **said, "max_tokens": request.new_tokens, **ours, **self.extra}
        return json.dumps({name: value for name, value in whole.items() if value is not None}).encode()


def base_of(address: str) -> str:
    """The address that a person gave, without a slash at its end; `/v1` is added where it has no path.

    Raises:
        InputError: it is no http or https address of a host alone.
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    plain = address.isprintable() and address.isascii() and " " not in address and "@" not in parts.netloc
    known = parts.scheme in ("http", "https") and parts.hostname and port != 0
    if not (plain and known) or parts.query or parts.fragment:
        raise InputError(f"the address is {address!r}; expected one such as http://127.0.0.1:8000/v1")
    return address.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def check_library() -> None:
    """Raise InputError unless the HTTP library is installed."""
    if importlib.util.find_spec("httpx2") is None:
        raise InputError("bench-serve needs httpx2, which is not installed; install the extra chai_jax[serve]")


async def check_listening(base: str) -> None:
    """Raise InputError unless somebody takes a connection at this address."""
    parts = urlsplit(base)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        async with asyncio.timeout(PATIENCE):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except (OSError, UnicodeError) as error:  # a host's name that cannot be one is a UnicodeError
        why = f"no answer in {PATIENCE:g} s" if isinstance(error, TimeoutError) else reason(error)
        raise InputError(
            f"nobody listens at {parts.hostname}:{port} ({why}); expected a server: start it, or check the address"
        ) from None
    writer.close()


class Client:
    """Connections to one server: as many as there are requests at once."""

    def __init__(self, server: Server, http: Any, clock: Callable[[], float] = time.monotonic):
        self.server, self._http, self.clock = server, http, clock

    async def ask(self, answer: Answer, request: Request) -> None:
        """Send a request and hear its answer to the end; whatever goes wrong is in `answer.outcome`."""
        import httpx2

        answer.sent = self.clock()
        try:
            async with asyncio.timeout(self.server.timeout):
                async with self._http.stream("POST", self.server.url, content=self.server.body(request)) as response:
                    if response.status_code == 200:
                        await self._listen(answer, response)
                    else:
                        answer.message = message_of(await _beginning(response))
                        answer.outcome = str(response.status_code)
        except TimeoutError:
            answer.outcome, answer.message = TIMEOUT, f"not done in {self.server.timeout:g} s"
        except httpx2.HTTPError as error:
            unreached = isinstance(error, httpx2.ConnectError)
            answer.outcome = NO_CONNECTION if unreached else BROKEN
            if _out_of_descriptors(error):
                answer.outcome = NO_DESCRIPTORS
            answer.message = reason(error)[:MESSAGE]
        except ValueError as error:  # what it streams cannot be understood
            answer.outcome, answer.message = BROKEN, reason(error)[:MESSAGE]
        if answer.outcome != UNFINISHED:
            answer.end = answer.end or self.clock()

    async def _listen(self, answer: Answer, response: Any) -> None:
        events, stream, ended = Events(), response.aiter_raw(), False
        async for data in stream:
            now = self.clock()
            for event in events.feed(data):
                ended = ended or hear(answer, event, now)
            if ended:
                answer.end = now
                break
        if not (ended or answer.finish):
            kind = response.headers.get("content-type", "none")[:60]
            raise ValueError(f"the answer ended without [DONE] or finish_reason (content-type {kind})")
        answer.outcome = "200"
        with suppress(TimeoutError):  # a connection whose answer was read to its end serves the next request too
            async with asyncio.timeout(LINGER):
                async for _ in stream:
                    pass


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Client]:
    """A client of `server`. It goes there directly, through no proxy."""
    import httpx2

    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if server.api_key is not None:
        headers["authorization"] = f"Bearer {server.api_key}"
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_IDLE)
    async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=None, trust_env=False) as http:
        yield Client(server, http)


async def _beginning(response: Any) -> bytes:
    """The first bytes of a body."""
    data = b""
    async for more in response.aiter_raw():
        data += more
        if len(data) > LONGEST_REFUSAL:
            break
    return data


def _out_of_descriptors(error: BaseException | None) -> bool:
    """Whether an error comes from this process's own limit of open files."""
    while error is not None:
        inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        if any(map(_out_of_descriptors, inner)):
            return True
        error = error.__cause__ or error.__context__
    return False
