"""The engine: one thread that reads prompts and makes tokens of all requests, in turns.

A turn reads one piece of one prompt, then makes a token (several, where nobody waits) of every request that has a slot:
so a long prompt holds nobody up for longer than a piece of it takes. Greedy texts are those of `generate`, whatever
else is in the batch.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from chai_jax.compress.quantize import with_storage
from chai_jax.console import console, track
from chai_jax.errors import InputError
from chai_jax.model.cache import cache_bytes
from chai_jax.model.model import Model
from chai_jax.serve.batch import Batch, Job
from chai_jax.serve.capacity import check_smaller, dense_slots, each_token, format_of, room
from chai_jax.serve.decode import serving_params
from chai_jax.serve.job import (
    MOST_ALTERNATIVES,
    Closing,
    Ended,
    Ending,
    Event,
    Full,
    Listener,
    Made,
    Status,
    Ticket,
    Token,
    Wanted,
)
from chai_jax.serve.prefixes import Prefixes
from chai_jax.serve.request import check_numbers, check_prompts
from chai_jax.serve.sample import Sampling
from chai_jax.serve.slots import MOST_STEPS

QUIET = 50  # turns in a row that need less, before what runs is moved to something smaller


class Engine:
    """Requests for texts, answered side by side.

    Args:
        limit: bytes that the cache may take.
        context: tokens of a sequence, prompt and answer, at most.
        most_slots: sequences that are continued at once, at most (default: as many as fit).
        prefixes: shared beginnings that are kept.
        most_queued: requests that may wait.
        adaptive: formats of the cache, from that of a quiet time on; the next one is turned to where requests wait and
            all slots are taken. None: what the model is stored as, always.

    Raises:
        InputError: the cache does not hold one sequence; formats that are unknown or not one smaller than the other.
    """

    def __init__(
        self,
        model: Model,
        limit: int,
        context: int,
        most_slots: int | None = None,
        prefixes: int = 0,
        most_queued: int = 256,
        adaptive: Sequence[str] = (),
    ) -> None:
        models = [with_storage(model, storage) for storage in adaptive] or [model]
        self.rooms = [room(each, limit, context, prefixes, most_slots) for each in models]
        check_smaller(adaptive, self.rooms)
        self.model, self.most_queued = models[0], most_queued
        params = serving_params(models[0], models[0].how)
        self.batches = [
            Batch(each, params, of.columns, of.slots, format_of(each.spec))
            for each, of in zip(models, self.rooms, strict=True)
        ]
        self.at = 0  # which of the batches is in use
        self.prefixes = Prefixes(prefixes)
        self._waiting: deque[Job] = deque()
        self._reading: Job | None = None
        self._changed = threading.Condition()
        self._closing: float | None = None  # when what runs is cut
        self._quiet = 0
        self._read = self._made = self._looked_up = self._reused = 0
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="chai_jax engine", daemon=True)

    @property
    def batch(self) -> Batch:
        """The slots in use."""
        return self.batches[self.at]

    def start(self, warm: bool = True) -> None:
        """Compile all that requests may need, if wanted, and begin to answer them."""
        if warm:
            for at, batch in enumerate(track(self.batches, "Compiling")):
                batch.warm_up([other for to, other in enumerate(self.batches) if abs(to - at) == 1])
                batch.free()
        self.batch.reset()
        self._thread.start()

    def submit(self, wanted: Wanted, listen: Listener, seconds: float | None = None) -> Ticket:
        """Ask for a text. `listen` hears of it from the engine's own thread: `Made` again and again, `Ended` last.

        Args:
            seconds: time that it may take, waiting included; then it ends as `late`.

        Raises:
            InputError: settings out of range; a prompt that with `max_new_tokens` does not fit the context.
            Full: as many wait as may. Closing: no more are taken.
        """
        self._check(wanted)
        latest = float("inf") if seconds is None else time.monotonic() + seconds
        job = Job(Ticket(wanted), listen, latest)
        with self._changed:
            if self._closing is not None:
                raise Closing("the server is about to stop and takes no more requests")
            if len(self._waiting) >= self.most_queued:
                raise Full(f"{len(self._waiting)} requests wait already, which is the most; ask again later")
            self._waiting.append(job)
            self._changed.notify()
        return job.ticket

    def _check(self, wanted: Wanted) -> None:
        context = self.rooms[0].context
        check_numbers(wanted.max_new_tokens, wanted.seed)
        Sampling.checked(wanted.temperature, wanted.top_k, wanted.top_p)
        if not 0 <= wanted.alternatives <= MOST_ALTERNATIVES:
            raise InputError(f"{wanted.alternatives} logprobs were asked for; expected 0 to {MOST_ALTERNATIVES}")
        check_prompts(self.model, [wanted.prompt], 1)
        if len(wanted.prompt) + wanted.max_new_tokens > context + 1:  # the last new token is never read
            raise InputError(
                f"the prompt has {len(wanted.prompt)} tokens and {wanted.max_new_tokens} are to be made; the context "
                f"is {context} tokens: shorten the prompt or lower max_tokens"
            )

    def status(self) -> Status:
        """What the engine does and has done; from any thread, a moment old at most."""
        batch, of = self.batch, self.rooms[self.at]
        slots = len(batch.jobs)
        with self._changed:
            queued = len(self._waiting) + (self._reading is not None)
        one = cache_bytes(batch.model.spec, 1, of.columns)
        return Status(
            format=batch.format,
            slots=of.slots,
            dense_slots=dense_slots(self.model, of),
            context=of.context,
            bytes_per_token=each_token(batch.model),
            running=batch.running,
            queued=queued,
            kv_bytes=(slots + (self._reading is not None)) * one + self.prefixes.nbytes,
            kv_limit=of.limit,
            read=self._read,
            made=self._made,
            looked_up=self._looked_up,
            reused=self._reused,
            seconds=time.monotonic() - self._began,
        )

    def close(self, grace: float = 0.0) -> None:
        """Take no more requests; those that are there go on for at most `grace` seconds, then they end as `cut`."""
        with self._changed:
            until = time.monotonic() + grace
            self._closing = until if self._closing is None else min(self._closing, until)
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._busy() and self._closing is None:
                    self._changed.wait(timeout=1)
                if not self._busy():
                    return
            try:
                self.turn()
            except Exception as error:  # what ran is lost, since its cache may be; the engine is not
                console.print(f"the engine failed ({type(error).__name__}: {str(error)[:200]}) and goes on without it")
                self._fail()

    def _busy(self) -> bool:
        return bool(self._waiting) or self._reading is not None or self.batch.running > 0

    def turn(self) -> None:
        """One turn of the engine; by its own thread, or by a test."""
        self._sweep()
        self._adapt()
        if self._reading is None and self._waiting and self._room():
            with self._changed:
                self._reading = self._waiting.popleft()
        if self._reading is not None:
            self._read_on(self._reading)
        if self.batch.running:
            waits = self._reading is not None or (bool(self._waiting) and self._room())
            for job, tokens, last in self.batch.step(1 if waits else MOST_STEPS):
                self._tell(job, tokens, last)

    def _room(self) -> bool:
        return self.batch.running < self.batch.most

    def _read_on(self, job: Job) -> None:
        begins = not job.pieces
        done = self.batch.read(job, self.prefixes)
        if begins and self.prefixes.most:
            self._looked_up += len(job.wanted.prompt)
            self._reused += job.reused
        if not done:
            return
        one, first = self.batch.begin(job)
        last = job.wanted.max_new_tokens == 1 or self._stops(job, first)
        if not last:
            self.batch.put(job, one)
        self._reading = None  # not before: what fails until here is told of this job too
        self._read += len(job.wanted.prompt)
        self._tell(job, (first,), last)

    def _stops(self, job: Job, token: Token) -> bool:
        return job.wanted.stop and token.id in self.model.stop_tokens

    def _tell(self, job: Job, tokens: tuple[Token, ...], last: bool) -> None:
        self._made += len(tokens)
        if tokens:
            self._say(job, Made(tokens))
        if last:
            self._end(job, "stop" if tokens and self._stops(job, tokens[-1]) else "length")

    def _end(self, job: Job, why: Ending) -> None:
        job.cache = None
        self._say(job, Ended(why, job.reused))

    def _say(self, job: Job, event: Event) -> None:
        """Whatever a listener does, the engine goes on."""
        try:
            job.listen(event)
        except Exception:
            job.ticket.cancel()

    def _sweep(self) -> None:
        """End what is not wanted any more."""
        now = time.monotonic()
        cut = self._closing is not None and now >= self._closing

        def over(job: Job) -> Ending | None:
            return "cancelled" if job.ticket.cancelled else "cut" if cut else "late" if now >= job.latest else None

        for job in [job for job in self.batch.jobs if job is not None]:
            if why := over(job):
                self.batch.remove(job)
                self._end(job, why)
        if self._reading is not None and (why := over(self._reading)):
            job, self._reading = self._reading, None
            self._end(job, why)
        with self._changed:
            ended = [(job, why) for job in self._waiting if (why := over(job))]
            for job, _ in ended:
                self._waiting.remove(job)
        for job, why in ended:
            self._end(job, why)

    def _adapt(self) -> None:
        """More or fewer slots, in the same format or in the next."""
        if self._waiting and not self._room() and self.at + 1 < len(self.batches):
            self._turn_to(self.at + 1)
        wanted = self.batch.running + len(self._waiting) + (self._reading is not None)
        smaller = self.at > 0 and wanted <= self.rooms[self.at - 1].slots // 2
        fewer = wanted <= self.batch.fewer
        self._quiet = self._quiet + 1 if smaller or fewer else 0
        if self._quiet >= QUIET or (self._quiet and not self.batch.running):  # where nothing runs nothing is moved
            self._quiet = 0
            if smaller:
                self._turn_to(self.at - 1)
            else:
                self.batch.shrink()

    def _turn_to(self, at: int) -> None:
        if self._reading is not None:
            return  # its cache is of the format before; the next turn will do
        before, after = self.batch, self.batches[at]
        self.prefixes.clear()
        before.hand_over(after)
        self.at = at

    def _fail(self) -> None:
        held = [self._reading, *(job for batch in self.batches for job in batch.jobs)]
        lost = dict.fromkeys(job for job in held if job is not None)  # each once, though on its way it is in two places
        self._reading = None
        self.prefixes.clear()
        for batch in self.batches:
            batch.free()
        with suppress(Exception):
            self.batch.reset()
        for job in lost:
            self._end(job, "failed")
