"""An HTTP server whose answers a test writes, and which remembers what it was asked."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


@dataclass
class Asked:
    """One request as it came, and how to answer it."""

    number: int
    path: str
    headers: dict[str, str]
    body: Record
    writer: asyncio.StreamWriter

    async def refuse(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.writer.write(f"HTTP/1.1 {status} No\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await self.writer.drain()

    async def begin(self) -> None:
        self.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await self.writer.drain()

    async def send(self, data: bytes) -> None:
        """One chunk."""
        self.writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await self.writer.drain()

    async def event(self, value: Any) -> None:
        await self.send(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")

    async def finish(self) -> None:
        await self.event(b"[DONE]")
        await self.send(b"")

    async def say(self, pieces: int, tokens: int | None = None, pause: float = 0.0, prompt_tokens: int = 7) -> None:
        """A whole answer: pieces of text, why it ended, and, if given, the number of tokens."""
        await self.begin()
        for at in range(pieces):
            await asyncio.sleep(pause)
            await self.event({"choices": [{"text": f" {at}", "finish_reason": None}], "usage": None})
        await self.event({"choices": [{"text": "", "finish_reason": "length"}]})
        if tokens is not None:
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
            await self.event({"choices": [], "usage": usage})
        await self.finish()


Script = Callable[[Asked], Awaitable[None]]


@dataclass
class ScriptedServer:
    """Answers by `script` on a port of its own, in a thread of its own, while it is entered.

    Attributes:
        connections: that were ever taken; `most`: requests that were being answered at once.
        port: 0 until it has one, if it may be any.
    """

    script: Script
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    now: int = 0
    most: int = 0
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "ScriptedServer":
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self, ready: threading.Event) -> None:
        async def whole() -> None:
            self._over = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=512)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            await self._over.wait()
            server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(whole())

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                one = Asked(len(self.asked), head[0].split()[1], headers, json.loads(body or b"{}"), writer)
                self.asked.append(one)
                self.now += 1
                self.most = max(self.most, self.now)
                try:
                    await self.script(one)
                finally:
                    self.now -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
