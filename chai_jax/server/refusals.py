"""Requests that are not answered: a status, and OpenAI's JSON that says why."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

TYPES = {401: "authentication_error", 500: "server_error", 503: "server_error", 504: "server_error"}


class Refused(Exception):
    """A request that ends with an error.

    Attributes:
        status: of HTTP.
        param: the request's field that is to blame, if one is.
        code: a word that programs can look for.
        headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return as_json(self.body, self.status, self.headers)


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """In ASCII: what a request had in it, half a surrogate too, can be told to whoever sent it."""
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


def full() -> Refused:
    return Refused(503, "too many requests wait: try again later", None, "queue_full", {"Retry-After": "1"})


def closing() -> Refused:
    return Refused(503, "the server is ending: try again later", None, "closing", {"Retry-After": "10"})


def ended(why: str) -> Refused:
    """What to say of a text that the engine ended early."""
    if why == "late":
        return Refused(504, "the request's time is up: ask for fewer tokens, or try again later", None, "timeout")
    if why == "failed":
        return Refused(500, "the engine failed; the server's log says why", None, "engine_failed")
    return closing()
