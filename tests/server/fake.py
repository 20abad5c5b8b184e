"""An engine without a model, in a thread of its own: it says what its script says, at its own pace.

`python tests/server/fake.py PORT PACE GRACE` serves it until it is told to end.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from chai_jax.errors import InputError
from chai_jax.serve.job import Closing, Ended, Full, Listener, Made, Status, Ticket, Token, Wanted

END, BYTES = 2, 4  # the token that ends a text; the first token that stands for a byte


class ByteTokenizer:
    """One token per byte of UTF-8, and `</s>` first."""

    bos_token = eos_token = "</s>"
    bos_token_id = eos_token_id = END
    all_special_ids = (0, 1, END, 3)
    chat_template = "a function"

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [*[END] * add_special_tokens, *(BYTES + byte for byte in text.encode())]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        special = b"" if skip_special_tokens else b"</s>"
        return b"".join(bytes([token - BYTES]) if token >= BYTES else special for token in tokens).decode(
            errors="replace"
        )

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, **ways: bool) -> str:
        if messages[0]["content"] == "refuse me":
            raise RuntimeError("roles must\nalternate")
        text = "".join(f"<{one['role']}>{one['content']}\n" for one in messages)
        return text + "<assistant>" * ways["add_generation_prompt"]


def said(text: str) -> list[int]:
    return [BYTES + byte for byte in text.encode()]


def echo(wanted: Wanted) -> list[int]:
    """The prompt's text again, with the number of the choice behind it, and the end."""
    return [*(token for token in wanted.prompt if token >= BYTES), *said(f"#{wanted.number}"), END]


class FakeEngine:
    """Attributes:
    reply: what a request is continued by.
    pace: seconds between two steps.
    each: tokens of a step.
    endings: of a prompt with one of these texts in it: after how many tokens it ends, and why.
    tickets: all that were given.
    """

    def __init__(self, reply: Callable[[Wanted], list[int]] = echo, pace: float = 0.0, each: int = 1):
        self.reply, self.pace, self.each = reply, pace, each
        self.slots, self.most_queued, self.context = 4, 4, 4096
        self.endings: dict[str, tuple[int, Any]] = {}
        generation = SimpleNamespace(sampling={})
        config = SimpleNamespace(vocab_size=BYTES + 256)
        self.model: Any = SimpleNamespace(
            tokenizer=ByteTokenizer(), source="/secret/place", stop_tokens=(END,), generation=generation, config=config
        )
        self.tickets: list[Ticket] = []
        self.seconds: list[float | None] = []
        self._jobs: list[list[Any]] = []  # ticket, listener, reply, tokens made so far
        self._lock, self._closed, self._cut_at = threading.Lock(), threading.Event(), float("inf")
        self._read = self._made = 0
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, wanted: Wanted, listen: Listener, seconds: float | None = None) -> Ticket:
        if len(wanted.prompt) + wanted.max_new_tokens > self.context:
            raise InputError(f"{len(wanted.prompt)} and {wanted.max_new_tokens} do not fit {self.context} tokens")
        with self._lock:
            if self._cut_at < float("inf"):
                raise Closing
            if len(self._jobs) >= self.slots + self.most_queued:
                raise Full
            ticket = Ticket(wanted)
            self._read += len(wanted.prompt)
            self._jobs.append([ticket, listen, self.reply(wanted), 0])
            self.tickets.append(ticket)
            self.seconds.append(seconds)
        return ticket

    def _work(self) -> None:
        while not (self._closed.is_set() and not self._jobs):
            time.sleep(self.pace or 0.0005)
            with self._lock:
                now = self._jobs[: self.slots]
            for job in now:
                if self._step(job):
                    with self._lock:
                        self._jobs.remove(job)

    def _step(self, job: list[Any]) -> bool:
        """Whether it is over."""
        ticket, listen, reply, made = job
        wanted: Wanted = ticket.wanted
        text = bytes(token - BYTES for token in wanted.prompt if token >= BYTES).decode(errors="replace")
        early = next((ending for mark, ending in self.endings.items() if mark in text), (10**9, "failed"))
        why = "cancelled" if ticket.cancelled else "cut" if time.monotonic() > self._cut_at else None
        why = early[1] if why is None and made >= early[0] else why
        if why is None:
            limit = min(wanted.max_new_tokens, early[0], len(reply))
            ids = reply[made : min(made + self.each, limit)]
            job[3] = made = made + len(ids)
            self._made += len(ids)
            alternatives = tuple((BYTES + 97 + at, -1.0 - at) for at in range(wanted.alternatives))
            kind = "int8" if made % 2 else "int4"
            if ids:
                listen(Made(tuple(Token(one, -0.5, kind, alternatives) for one in ids)))
            if made >= len(reply):
                why = "stop" if reply[-1] == END else "length"
            elif made >= wanted.max_new_tokens:
                why = "length"
        if why is not None:
            listen(Ended(why, min(3, len(wanted.prompt))))
        return why is not None

    def status(self) -> Status:
        with self._lock:
            jobs = len(self._jobs)
        running, seconds = min(jobs, self.slots), time.monotonic() - self._began
        numbers = {"kv_bytes": 4 << 20, "kv_limit": 8 << 20, "read": self._read, "made": self._made}
        return Status("k4v4", self.slots, 1, self.context, 96.5, running, jobs - running, looked_up=9, reused=3,
                      seconds=seconds, **numbers)  # fmt: skip

    def close(self, grace: float) -> None:
        self._cut_at = min(self._cut_at, time.monotonic() + grace)
        self._closed.set()
        self._thread.join()


if __name__ == "__main__":
    from chai_jax.server.run import serve
    from chai_jax.server.settings import ServerSettings

    port, pace, grace = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    serve(FakeEngine(pace=pace), ServerSettings("fake", port=port, grace=grace))
    print("ended", flush=True)
