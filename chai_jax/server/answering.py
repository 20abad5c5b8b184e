"""One request for texts, from its body to its answer's last byte; a client that goes away ends it."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from chai_jax.data.tokens import require_tokenizer
from chai_jax.server.answers import Shape
from chai_jax.server.choices import Choices, Place
from chai_jax.server.metrics import Metrics
from chai_jax.server.protocol import Asked, encode, read_request, wanted
from chai_jax.server.refusals import Refused, as_json, closing
from chai_jax.server.settings import Engine, ServerSettings
from chai_jax.server.text import TokenTexts

GONE = 499  # what counts a client that went away before its answer was whole; it is sent to nobody
CLOSE = {"Connection": "close"}  # after a body that was not read to its end
USUAL = {"temperature": 1.0, "top_k": None, "top_p": None}  # OpenAI's
GREEDY = {**USUAL, "temperature": 0.0}


class Gone(Exception):
    """The client went away."""


class Desk:
    """What all requests of a server share.

    Attributes:
        usual: sampling of requests without a temperature: what the model's generation_config.json says, or OpenAI's
            where there is none.
        closing: whether further requests are refused.
    """

    def __init__(self, engine: Engine, settings: ServerSettings):
        tokenizer = require_tokenizer(engine.model.tokenizer, settings.name)
        self.engine, self.settings, self.closing = engine, settings, False
        self.metrics = Metrics(engine.status)
        self.special = frozenset(tokenizer.all_special_ids)
        self.texts = TokenTexts(tokenizer)
        folder = engine.model.generation
        self.usual = USUAL if folder is None else {**GREEDY, **folder.sampling}
        # One, since tokenizers are not made for several threads at a time.
        self.threads = ThreadPoolExecutor(1, "tokenizer")


class Answering:
    """An ASGI response that does the request's work while it watches whether the client is still there."""

    def __init__(self, desk: Desk, request: Request, chat: bool):
        self._desk, self._request, self._chat = desk, request, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(self._request, self._desk.settings)
            await _unless_gone(receive, self._answer(body, scope, receive, send))
        except (Gone, ClientDisconnect):
            scope["outcome"]["status"] = GONE

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        desk = self._desk
        if desk.closing:
            raise closing()
        asked = read_request(body, self._chat, desk.settings.name, desk.usual)
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(desk.threads, encode, asked, desk.engine.model, desk.settings.name)
        texts = wanted(asked, prompts, desk.engine.status().context)
        shape = Shape(asked, desk.settings.name, desk.texts)
        with Choices(desk.engine, texts, asked.stops, desk.settings.seconds, desk.special) as choices:
            try:
                if asked.stream:
                    await self._stream(asked, choices, shape, scope, send)
                else:
                    await as_json(await _whole(choices, shape))(scope, receive, send)
            finally:
                for choice in choices.all:
                    desk.metrics.ended(choice)

    async def _stream(self, asked: Asked, choices: Choices, shape: Shape, scope: Scope, send: Send) -> None:
        """Send events as they come; nothing before the first, so that what fails at once fails by its status."""
        started = False

        async def put(data: str) -> None:
            nonlocal started
            if not started:
                started = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            message = {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}
            await send(message)

        try:
            async for chunk in _chunks(asked, choices, shape):
                await put(json.dumps(chunk, allow_nan=False))
        except Refused as refused:
            if not started:
                raise
            scope["outcome"]["status"] = refused.status
            await put(json.dumps(refused.body))
        await put("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _chunks(asked: Asked, choices: Choices, shape: Shape) -> AsyncIterator[dict[str, Any]]:
    opened: set[int] = set()
    closed: set[int] = set()
    async for choice, text, places in choices.heard():
        if asked.messages is not None and choice.index not in opened:
            opened.add(choice.index)
            yield shape.opening(choice)
        if text or (places and asked.alternatives is not None):
            yield shape.chunk(choice, text, places)
        if choice.finish is not None and choice.index not in closed:
            closed.add(choice.index)
            yield shape.chunk(choice, "", [], choice.finish)
    if asked.usage:
        yield shape.usage_chunk(choices.all)


async def _whole(choices: Choices, shape: Shape) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in choices.all]
    places: list[list[Place]] = [[] for _ in choices.all]
    async for choice, text, new in choices.heard():
        texts[choice.index].append(text)
        places[choice.index] += new
    return shape.whole(choices.all, ["".join(pieces) for pieces in texts], places)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, but for a client that is there. Its body must have been read.

    Raises:
        Gone: it went away, and the work was cancelled.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """A request's body.

    Raises:
        Refused: it is no JSON by its headers (415), too large (413), or does not arrive (408).
        ClientDisconnect: the client went away.
    """
    kind, _, rest = request.headers.get("content-type", "").lower().partition(";")
    parameter = "".join(rest.split()).replace('"', "")
    if kind.strip() != "application/json" or parameter not in ("", "charset=utf-8"):
        words = "the body is not called JSON in UTF-8; expected the header Content-Type: application/json"
        raise Refused(415, words, headers=CLOSE)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "the body has a Content-Encoding; expected none: send plain JSON", headers=CLOSE)
    most = settings.body_bytes
    large = Refused(413, f"the body is larger than {most} bytes: send less", None, "too_large", CLOSE)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > most):
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise large
    except TimeoutError:
        late = f"the body did not arrive within {settings.body_seconds:g} seconds: send it at once"
        raise Refused(408, late, None, "timeout", CLOSE) from None
    return bytes(body)
