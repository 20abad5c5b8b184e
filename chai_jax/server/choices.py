"""The texts of one request as the engine makes them, told from its thread to asyncio's."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from chai_jax.errors import InputError
from chai_jax.serve.job import Closing, Ended, Event, Full, Ticket, Token, Wanted
from chai_jax.server.refusals import Refused, closing, ended, full
from chai_jax.server.settings import Engine
from chai_jax.server.text import Pieces, Stops


@dataclass(frozen=True)
class Place:
    """A token and where its text begins: characters of its choice's text before it."""

    token: Token
    offset: int


@dataclass
class Choice:
    """One text.

    Attributes:
        finish: why it is complete, in OpenAI's words; None while it is not.
        over: whether the engine has said its last word of it.
        reused: tokens of the prompt that the engine did not have to read.
        formats: how many tokens were made from a cache stored as what.
        began, first, last: when it was asked for, and when its first and last tokens came, in seconds.
    """

    index: int
    wanted: Wanted
    pieces: Pieces
    stops: Stops
    ticket: Ticket | None = None
    finish: str | None = None
    over: bool = False
    reused: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    _length: int = 0

    @property
    def made(self) -> int:
        return sum(self.formats.values())

    def hear(self, event: Event) -> tuple[str, list[Place]]:
        """The text that is sure now, and the tokens that came, up to one that completes a stop string.

        Raises:
            Refused: the engine gave it up.
        """
        if isinstance(event, Ended):
            self.over, self.reused = True, event.reused
            if self.finish is not None:
                return "", []
            if event.why not in ("stop", "length"):
                raise ended(event.why)
            self.finish = event.why
            text = self.stops.add(self.pieces.rest())
            if self.stops.found:
                self.finish = "stop"
            return text + self.stops.rest(), []
        text, places = "", []
        self.last = time.monotonic()
        self.first = self.last if self.first is None else self.first
        for token in event.tokens:
            if self.finish is not None:
                break
            self.formats[token.format] += 1
            places.append(Place(token, self._length))
            piece = self.pieces.add(token.id)
            self._length += len(piece)
            text += self.stops.add(piece)
            if self.stops.found:
                self.finish = "stop"
                self.cancel()
        return text, places

    def cancel(self) -> None:
        if self.ticket is not None and not self.over:
            self.ticket.cancel()


class Choices:
    """The texts of one request. To be entered: whatever is still being made when it is left is cancelled."""

    def __init__(
        self,
        engine: Engine,
        wanted: Sequence[Wanted],
        stops: Sequence[str] = (),
        seconds: float | None = None,
        special: Collection[int] = (),
    ):
        """Ask the engine for them.

        Args:
            stops: strings that end a text.
            seconds: that they may take, waiting included.
            special: tokens that say nothing.

        Raises:
            Refused: it does not take them.
        """
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[Choice, Event]] = asyncio.Queue()
        tokenizer = engine.model.tokenizer
        self.all = [Choice(index, one, Pieces(tokenizer, special), Stops(stops)) for index, one in enumerate(wanted)]
        try:
            for choice in self.all:
                choice.ticket = engine.submit(choice.wanted, self._listener(choice), seconds)
        except BaseException as error:
            self.cancel()
            if isinstance(error, InputError):
                raise Refused(400, str(error)) from None
            if isinstance(error, (Full, Closing)):
                raise (full() if isinstance(error, Full) else closing()) from None
            raise

    def _listener(self, choice: Choice) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

        return listen

    async def heard(self) -> AsyncIterator[tuple[Choice, str, list[Place]]]:
        """Each choice that goes on, its new text and its new tokens, until all are over.

        Raises:
            Refused: the engine gave one of them up.
        """
        while not all(choice.over for choice in self.all):
            choice, event = await self._events.get()
            yield choice, *choice.hear(event)

    def cancel(self) -> None:
        for choice in self.all:
            choice.cancel()

    def __enter__(self) -> "Choices":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
