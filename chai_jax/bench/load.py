"""A load of requests on a server, open or closed, and when its client was too slow to keep it.

Open: requests fall due as a Poisson process and are sent then, whatever became of those before. If the server is slow,
they queue, as those of people do. All durations count from when a request was due: were they counted from when it was
sent, or were the next one sent only after an answer, a server that stalls would be asked less while it does, and its
worst times would hardly be in the figures (coordinated omission).

Closed: so many at once; each answer makes room for the next request.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from chai_jax.bench.load_answers import NO_CONNECTION, Answer, Request
from chai_jax.config.checks import check_seed, require
from chai_jax.errors import InputError

# A first answer like these would be the answer to all: wrong key, model, address or method.
HOPELESS = {*map(str, range(300, 400)), "401", "403", "404", "405"}
PAUSE = 0.1  # seconds that one of a closed load waits after a refusal, so that it does not only ask and be refused
REFUSALS = {"429", "503", NO_CONNECTION}
WATCH = 0.05  # seconds between two looks at how late the event loop is
BLOCK = 1024  # gaps drawn at once


@runtime_checkable
class Asks(Protocol):
    """What a load is sent by: a client, or what stands for one in a test."""

    @property
    def clock(self) -> Callable[[], float]: ...

    async def ask(self, answer: Answer, request: Request) -> None: ...


@dataclass(frozen=True)
class Load:
    """What is sent, and when.

    Attributes:
        rate: requests a second, of an open load; `concurrency`: at once, of a closed one. One of the two is None.
        requests, seconds: the load ends with whichever comes first; one of them may be None.
        warm_up: requests that are sent and answered before the load begins, and not counted.
    """

    rate: float | None = None
    concurrency: int | None = None
    requests: int | None = 100
    seconds: float | None = None
    warm_up: int = 1
    seed: int = 0

    def check(self) -> None:
        """Raise InputError, which names the option, unless such a load can be."""
        if (self.rate is None) == (self.concurrency is None):
            raise InputError(
                "give one of --rate (requests a second, open loop) and --concurrency (requests at once, closed loop)"
            )
        if self.requests is None and self.seconds is None:
            raise InputError("the load has no end; expected --requests or --seconds, or both")
        rate = 1.0 if self.rate is None else self.rate
        seconds = 1.0 if self.seconds is None else self.seconds
        require(self.rate is None or 1e-4 <= rate <= 1e5, "--rate", self.rate, "from 0.0001 to 100,000 a second")
        at_once = self.concurrency
        require(at_once is None or 1 <= at_once <= 2**16, "--concurrency", at_once, "from 1 to 65,536")
        count = self.requests
        require(count is None or 1 <= count <= 10**6, "--requests", count, "from 1 to 1,000,000")
        require(self.seconds is None or 1e-3 <= seconds <= 1e6, "--seconds", self.seconds, "from 0.001 to 1,000,000")
        require(0 <= self.warm_up <= 10**5, "--warm-up", self.warm_up, "from 0 to 100,000")
        most = min(self.requests or np.inf, rate * seconds)
        require(self.rate is None or most <= 10**6, "--rate times --seconds", most, "at most 1,000,000 requests")
        check_seed(self.seed, "--seed")


def arrivals(load: Load) -> Iterator[float]:
    """When requests of an open load fall due, in seconds from its beginning: gaps are exponential, with mean 1/rate."""
    assert load.rate is not None
    random, due, number = np.random.default_rng([load.seed, 0]), 0.0, 0
    while True:
        for gap in random.exponential(1 / load.rate, BLOCK):
            due += float(gap)
            if (load.seconds is not None and due > load.seconds) or number == load.requests:
                return
            number += 1
            yield due


@dataclass
class Measured:
    """What a load left, as far as it came.

    Attributes:
        began: when, by the client's clock.
        answers: of every request that was sent, in the order in which they fell due.
        finished: how many of them have ended, however.
        most_at_once: requests that were in flight.
        loop_late: seconds by which the client's event loop came late to a timer, every `WATCH` seconds.
        cpu: seconds of the client's processor.
    """

    began: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    finished: int = 0
    in_flight: int = 0
    most_at_once: int = 0
    loop_late: list[float] = field(default_factory=list)
    cpu: float = 0.0


class Sending:
    """Sends one load. `measured` can be read at any time, also after it was cancelled."""

    def __init__(
        self,
        load: Load,
        client: Asks,
        requests: Iterator[Request],
        warm: Iterator[Request],
        tick: Callable[[Measured], object] = lambda measured: None,
    ):
        self.load, self.measured = load, Measured()
        self._client, self._clock = client, client.clock
        self._requests, self._warm, self._tick = requests, warm, tick
        self._reached = False  # somebody answered as a server of this model does

    async def run(self) -> None:
        """Send all, and wait for all answers.

        Raises:
            InputError: the first answer says that no other will be better.
        """
        if self.load.warm_up:
            await self._closed(self.load.concurrency or 1, self.load.warm_up, None, self._warm, Measured())
        self.measured.began = self._clock()
        before = time.process_time()
        watch = asyncio.create_task(self._watch())
        try:
            if self.load.rate is not None:
                await self._open()
            else:
                size = self.load.concurrency or 1
                await self._closed(size, self.load.requests, self.load.seconds, self._requests, self.measured)
        finally:
            self.measured.cpu = time.process_time() - before
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _open(self) -> None:
        began = self.measured.began
        with _first_alone():
            async with asyncio.TaskGroup() as group:
                for after in arrivals(self.load):
                    # Also where it is late already: what was sent needs its turn.
                    await asyncio.sleep(max(0.0, began + after - self._clock()))
                    group.create_task(self._one(next(self._requests), began + after, self.measured))

    async def _closed(
        self, at_once: int, count: int | None, seconds: float | None, requests: Iterator[Request], into: Measured
    ) -> None:
        began = self._clock()

        async def one_after_another() -> None:
            while count is None or len(into.answers) < count:
                if seconds is not None and self._clock() - began >= seconds:
                    return
                answer = await self._one(next(requests), self._clock(), into)
                await asyncio.sleep(PAUSE if answer.outcome in REFUSALS else 0)

        with _first_alone():
            async with asyncio.TaskGroup() as group:
                for _ in range(min(at_once, count or at_once)):
                    group.create_task(one_after_another())

    async def _one(self, request: Request, due: float, into: Measured) -> Answer:
        answer = Answer(len(into.answers), request.new_tokens, due)
        into.answers.append(answer)
        into.in_flight += 1
        into.most_at_once = max(into.most_at_once, into.in_flight)
        try:
            await self._client.ask(answer, request)
        finally:
            into.in_flight -= 1
        into.finished += 1
        if not self._reached and answer.outcome in HOPELESS:
            raise InputError(
                f"the server answered {answer.outcome} ({answer.message or 'without a message'}); expected a "
                "completion: check the address, --model and --api-key"
            )
        self._reached = True
        self._tick(into)
        return answer

    async def _watch(self) -> None:
        while True:
            before = self._clock()
            await asyncio.sleep(WATCH)
            self.measured.loop_late.append(max(0.0, self._clock() - before - WATCH))


@contextmanager
def _first_alone() -> Iterator[None]:
    """Of a group of exceptions the first one alone leaves the block."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
