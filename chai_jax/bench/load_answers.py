"""One streamed answer of an OpenAI-compatible server: what was heard, when, and how it ended."""

import re
from dataclasses import dataclass, field
from typing import Any

from chai_jax.inputs.reading import Record, parse_json

LONGEST_EVENT = 2**20  # bytes
MESSAGE = 300  # characters that are kept of a server's message

# How a request ended, where it is no HTTP status.
UNFINISHED, TIMEOUT, NO_CONNECTION, BROKEN, NO_DESCRIPTORS = (
    "unfinished",
    "timed out",
    "no connection",
    "broken off",
    "too many open files here",
)


@dataclass(frozen=True)
class Request:
    """What is asked for: a text that continues `prompt`, of `new_tokens` at most."""

    prompt: str
    new_tokens: int


@dataclass
class Answer:
    """What became of a request. Times are seconds of one monotonic clock.

    Attributes:
        due: when it should have been sent; all durations count from here, so that a client or a server that falls
            behind does not hide it.
        pieces: when pieces of text came; several tokens may come as one piece.
        outcome: the HTTP status, or in words why there is none that counts; "200" only if the text came to its end.
        told: tokens of the text by the server's `usage`, if it says.
    """

    number: int
    asked: int
    due: float
    sent: float = 0.0
    end: float = 0.0
    pieces: list[float] = field(default_factory=list)
    outcome: str = UNFINISHED
    message: str = ""
    finish: str | None = None
    prompt_tokens: int | None = None
    told: int | None = None

    @property
    def good(self) -> bool:
        return self.outcome == "200"

    @property
    def tokens(self) -> int:
        """New tokens: as the server says, else the pieces."""
        return len(self.pieces) if self.told is None else self.told

    @property
    def first(self) -> float | None:
        """Seconds to the first text; of a text without any, to its end."""
        return (self.pieces[0] if self.pieces else self.end) - self.due if self.good else None

    @property
    def latency(self) -> float:
        return self.end - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first, the mean of this answer."""
        spread = len(self.pieces) > 1 and self.tokens > 1
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1) if spread else None

    def to_json(self, origin: float) -> Record:
        """One row of the files; `due` counts from `origin`, the other times from `due`."""
        heard = {"first": self.first, "latency": self.latency if self.end else None, "per_token": self.per_token}
        return {
            "number": self.number,
            "outcome": self.outcome,
            "due": self.due - origin,
            "late": self.sent - self.due if self.sent else None,
            **heard,
            "longest_gap": max(self.gaps, default=None),
            "asked_tokens": self.asked,
            "new_tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "pieces": len(self.pieces),
            "counted": "pieces" if self.told is None else "usage",
            "finish": self.finish,
            "message": self.message,
        }


class Events:
    """The data of server-sent events, from bytes that may be cut anywhere."""

    def __init__(self) -> None:
        self._held: list[bytes] = []  # of a line that has not ended
        self._data: list[bytes] = []
        self._size = 0
        self._returned = False

    def feed(self, data: bytes) -> list[bytes]:
        """The events that these further bytes complete.

        Raises:
            ValueError: an event is longer than `LONGEST_EVENT`.
        """
        if self._returned and data.startswith(b"\n"):
            data, self._returned = data[1:], False  # the second half of a line end
        if not data:
            return []
        self._returned = data.endswith(b"\r")
        first, *rest = re.split(rb"\r\n|\r|\n", data)
        self._held.append(first)
        found = []
        for line in rest:
            found += self._ended(b"".join(self._held))
            self._held = [line]
        self._size += len(data)
        if found:
            self._size = sum(map(len, self._held))
        if self._size > LONGEST_EVENT:
            raise ValueError(f"an event of more than {LONGEST_EVENT:,} bytes")
        return found

    def _ended(self, line: bytes) -> list[bytes]:
        """What ends with this line: an event, if the line is empty and there are data."""
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        if line or not self._data:
            return []
        whole, self._data = b"\n".join(self._data), []
        return [whole]


def hear(answer: Answer, event: bytes, now: float) -> bool:
    """Enter one event, which came at `now`, in `answer`. Returns whether it is the last.

    Raises:
        ValueError: it is no JSON object, tells of an error, or is one piece too many.
    """
    if event.strip() == b"[DONE]":
        return True
    chunk = parse_json(event.decode("utf-8"))
    if not isinstance(chunk, dict):
        raise ValueError("an event that is no JSON object")
    if chunk.get("error"):
        raise ValueError(message_of(event))
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta")
    delta = delta if isinstance(delta, dict) else {}
    if any((choice.get("text"), *(delta.get(name) for name in ("content", "reasoning_content", "reasoning")))):
        answer.pieces.append(now)
        if len(answer.pieces) > 4 * answer.asked + 64:
            raise ValueError(f"more than {len(answer.pieces) - 1} pieces of text for {answer.asked} tokens")
    answer.finish = str(choice["finish_reason"])[:40] if choice.get("finish_reason") else answer.finish
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        answer.told = _count(usage.get("completion_tokens"), answer.told)
        answer.prompt_tokens = _count(usage.get("prompt_tokens"), answer.prompt_tokens)
    return False


def _count(value: Any, before: int | None) -> int | None:
    return value if type(value) is int and 0 <= value < 2**40 else before


def message_of(body: bytes) -> str:
    """What the body of a refusal says, in one line of limited length."""
    text = body.decode("utf-8", "replace")
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return " ".join((found if isinstance(found, str) else text).split())[:MESSAGE]
