"""What the engine is asked for, and what it tells whoever asked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

MOST_ALTERNATIVES = 20  # likeliest tokens that are told at each place, at most

Ending = Literal["stop", "length", "cancelled", "late", "cut", "failed"]


@dataclass(frozen=True)
class Wanted:
    """One text that continues a prompt.

    Attributes:
        prompt: token ids, at least one.
        temperature: 0 is greedy; `top_k` and `top_p` as of `chai_jax.serve.sample.Sampling`.
        seed, number: these two alone decide what is drawn: `number` tells several choices of one request apart.
        stop: whether one of the model's own `stop_tokens` ends the text.
        alternatives: likeliest tokens to tell at each place, 0 to `MOST_ALTERNATIVES`.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    number: int = 0
    stop: bool = True
    alternatives: int = 0


@dataclass(frozen=True)
class Token:
    """One token that was made.

    Attributes:
        logprob: of this token, natural logarithm, by the model's own distribution: before temperature, top-k and top-p.
        alternatives: the likeliest tokens at its place and their logprobs, likeliest first.
        format: what the cache was stored as when it was made.
    """

    id: int
    logprob: float
    format: str
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Made:
    """Further tokens, one or more, in order. A token that ends the text (`stop`) is the last of them."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Ended:
    """Nothing follows.

    Attributes:
        why: a token that ends texts; as many as were asked for; whoever asked does not want it any more; its time was
            up; the engine was closed; the engine failed.
        reused: tokens of the prompt whose cache was there already.
    """

    why: Ending
    reused: int = 0


Event = Made | Ended
Listener = Callable[[Event], None]


class Full(Exception):
    """More requests wait than may."""


class Closing(Exception):
    """The engine takes no more requests."""


@dataclass(eq=False)
class Ticket:
    """A text that was asked for. `cancel` may be called at any time, from any thread, more than once."""

    wanted: Wanted
    cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Nothing more is made of it, from the next step on; its listener still hears `Ended`."""
        self.cancelled = True


@dataclass(frozen=True)
class Status:
    """What the engine is doing, and what it has done since it began.

    Attributes:
        format: what the cache is stored as now, in words.
        slots: sequences that fit the memory as it is stored now; `dense_slots`: in the dense model's bfloat16.
        running: requests that have a slot; `queued`: those that wait for one.
        kv_bytes: of the cache as allocated now; `kv_limit`: what it may take.
        read, made: tokens of prompts, and new ones.
        looked_up, reused: tokens of prompts that were looked for among kept prefixes, and those found.
        seconds: since it began.
    """

    format: str
    slots: int
    dense_slots: int
    context: int
    bytes_per_token: float
    running: int
    queued: int
    kv_bytes: int
    kv_limit: int
    read: int
    made: int
    looked_up: int
    reused: int
    seconds: float
