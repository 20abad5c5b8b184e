"""A server, from its first request until it is told to end."""

import asyncio
import contextlib
import math
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import uvicorn

from chai_jax.errors import InputError
from chai_jax.inputs.reading import reason
from chai_jax.server.app import make_app
from chai_jax.server.connection import settings_of_uvicorn
from chai_jax.server.settings import Engine, ServerSettings

SENDING = 5.0  # seconds for the last answers to be taken, once the engine is closed


def serve(engine: Engine, settings: ServerSettings) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then take none, and close the engine within the grace.

    Prints one line to stderr when it is ready. The engine is closed when this returns, however it does.

    Raises:
        InputError: the model has no tokenizer, or nothing can listen at this host and port.
    """
    try:
        app = make_app(engine, settings)
        listening = listen(settings.host, settings.port)
        patience = math.ceil(settings.grace + SENDING)
        options = settings_of_uvicorn(app, settings.host, settings.connections, patience)
        server = _Server(uvicorn.Config(**options), engine, settings, app.state.desk)
        with listening:
            asyncio.run(server.serve([listening]))
        app.state.desk.threads.shutdown(wait=False, cancel_futures=True)
    finally:
        engine.close(0.0)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        InputError: it cannot.
    """
    try:
        if not 0 <= port < 1 << 16:  # larger ones would be taken modulo 2^16
            raise OverflowError("no such port")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"cannot listen at {host!r:.80}, port {port} ({reason(error)}); expected an address of this machine and a "
            "port that is free: give another, or port 0 for any"
        ) from None
    return found


def is_private(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(uvicorn.Server):
    """uvicorn's, which says when it is ready, closes the engine at the end, and takes a signal for no failure."""

    def __init__(self, config: uvicorn.Config, engine: Engine, settings: ServerSettings, desk: Any):
        super().__init__(config)
        self._engine, self._settings, self._desk = engine, settings, desk

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        host, port = sockets[0].getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        print(f"serving {self._settings.name} at http://{name}:{port}/v1", file=sys.stderr, flush=True)
        if not is_private(self._settings.host) and self._settings.api_key is None:
            print("warning: whoever reaches this address may use it: set an API key", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The engine ends what runs, and tells it; meanwhile uvicorn closes what is idle, and waits for the others."""
        self._desk.closing = True
        ending = asyncio.create_task(asyncio.to_thread(self._engine.close, self._settings.grace))
        await super().shutdown(sockets)
        if self.force_exit:
            await asyncio.to_thread(self._engine.close, 0.0)
        await ending

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which then raises the signal once more: a server that was told to end has not failed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
