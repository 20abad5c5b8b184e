"""Connections: uvicorn's, which are closed if a request's head does not come in time, or nobody takes an answer."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for the first line and the headers of a request
TAKE_SECONDS = 30.0  # for a client to take some of an answer that waits for it


class Connection(H11Protocol):
    """uvicorn waits for ever for the rest of a head, and for a client that takes nothing; this one closes instead."""

    _limit: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._goes_on()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        # Closing would wait for what is not taken.
        self._stalled = self.loop.call_later(TAKE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._goes_on()
        super().resume_writing()

    def _goes_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except h11.LocalProtocolError:  # what was sent so far was no HTTP
            self.transport.close()

    def _wait(self) -> None:
        if self._limit is None and not self.transport.is_closing():
            self._limit = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _stop_waiting(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _too_late(self) -> None:
        self._limit = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def settings_of_uvicorn(app: Any, host: str, connections: int, patience: int) -> dict[str, Any]:
    """uvicorn's settings: plain HTTP/1.1, in asyncio's own loop, quiet.

    Args:
        patience: seconds that requests may go on for once the server is told to end, before they are cancelled.
    """
    return {
        "app": app,
        "host": host,
        "loop": "asyncio",
        "http": Connection,
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "log_level": "error",
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        "limit_concurrency": connections,
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": patience,
        "h11_max_incomplete_event_size": 32 * 1024,
    }
