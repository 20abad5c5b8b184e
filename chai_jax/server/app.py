"""The server's addresses, as an ASGI application; what each request goes through is in `answering`."""

import hmac
import time
from dataclasses import asdict
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chai_jax.server.answering import CLOSE, GONE, Answering, Desk
from chai_jax.server.page import page_response
from chai_jax.server.refusals import Refused, as_json
from chai_jax.server.settings import Engine, ServerSettings

HEAD_BYTES = 32 * 1024  # of a request's path and headers, at most
OPEN = ("/health", "/")  # that need no key: the page holds nothing but its own text
SAFE = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"), (b"referrer-policy", b"no-referrer")]


def make_app(engine: Engine, settings: ServerSettings) -> Starlette:
    """The application of one server. `app.state.desk.closing` set to True refuses further texts."""
    desk = Desk(engine, settings)
    served = int(time.time())

    async def completions(request: Request) -> Answering:
        return Answering(desk, request, chat=False)

    async def chats(request: Request) -> Answering:
        return Answering(desk, request, chat=True)

    def described() -> dict[str, Any]:
        now = engine.status()
        told = ("format", "bytes_per_token", "context", "slots", "dense_slots", "kv_bytes", "kv_limit")
        stored = {name: getattr(now, name) for name in told}
        return {"id": settings.name, "object": "model", "created": served, "owned_by": "chai_jax", **stored}

    async def models(request: Request) -> Response:
        return as_json({"object": "list", "data": [described()]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != settings.name:
            raise Refused(404, f"expected the model {settings.name!r}", "model", "model_not_found")
        return as_json(described())

    async def health(request: Request) -> Response:
        return as_json({"status": "ending" if desk.closing else "ok"}, 503 if desk.closing else 200)

    async def metrics(request: Request) -> Response:
        return Response(desk.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def status(request: Request) -> Response:
        return as_json({"name": settings.name, **asdict(engine.status())})

    async def page(request: Request) -> Response:
        return page_response()

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chats, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/status.json", status),
        Route("/", page),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Guard, desk=desk, known={route.path for route in routes})],
        exception_handlers={Refused: _refused, HTTPException: _not_here, Exception: _broken},
    )
    app.router.redirect_slashes = False
    app.state.desk = desk
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refused(
        error.status_code, f"{error.detail}: see /v1/models, /v1/completions", headers=error.headers
    ).response()


async def _broken(request: Request, error: Exception) -> Response:
    """Starlette raises it again, so that the log has it; the client learns nothing of the machine."""
    return Refused(500, "the server failed; its log says why").response()


class _Guard:
    """Around all routes: the key, headers that every answer has, and the count of what became of requests."""

    def __init__(self, app: ASGIApp, desk: Desk, known: set[str]):
        self._app, self._desk, self._known = app, desk, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        found = {"status": GONE}
        scope["outcome"] = found  # where a stream that breaks off says so

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                found["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), *SAFE]
            await send(message)

        try:
            refused = self._refused(scope)
            await (self._app if refused is None else refused.response())(scope, receive, noted)
        except Exception:
            found["status"] = 500
            raise
        finally:
            self._desk.metrics.answered(scope["path"] if scope["path"] in self._known else "other", found["status"])

    def _refused(self, scope: Scope) -> Refused | None:
        """Why a request goes no further, if it does not."""
        head = len(scope["path"]) + sum(len(name) + len(value) for name, value in scope["headers"])
        if head > HEAD_BYTES:  # uvicorn's own limit is for heads that come in several pieces
            return Refused(431, f"the head is larger than {HEAD_BYTES} bytes: send less", headers=CLOSE)
        key = self._desk.settings.api_key
        if key is None or scope["path"] in OPEN:
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, b"Bearer " + key.encode()):
            return None
        words = "the key is wrong or missing; expected the header Authorization: Bearer KEY"
        return Refused(401, words, None, "invalid_api_key", {"WWW-Authenticate": "Bearer", **CLOSE})
