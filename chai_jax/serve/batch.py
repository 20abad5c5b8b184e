"""The sequences that are being continued: who is in which slot, and as many slots as are needed just now.

A step costs what its slots cost, whether they are in use or not. So there are few where few are asked for: their number
is doubled and halved, and programs are compiled for each.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.machine.memory import give_back_freed
from chai_jax.model.cache import Cache
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.serve.decode import NEVER
from chai_jax.serve.generate import keys_of
from chai_jax.serve.job import Listener, Ticket, Token, Wanted
from chai_jax.serve.prefixes import Prefixes, upto
from chai_jax.serve.recode import recoded
from chai_jax.serve.sample import ALL, Sampling
from chai_jax.serve.slots import (
    CHUNK,
    MOST_STEPS,
    PIECES,
    Slots,
    Told,
    begin,
    insert,
    padded,
    pieces,
    read,
    release,
    resize,
    step,
    take,
    vacant,
)


@dataclass(eq=False)
class Job:
    """A request within the engine; `latest` is the time, by the engine's clock, at which it has to be done."""

    ticket: Ticket
    listen: Listener
    latest: float
    pieces: list[tuple[int, int]] = field(default_factory=list)  # of the prompt, still to be read
    cache: Cache | None = None  # of what was read
    hidden: Any = None  # of the last token that was read
    reused: int = 0

    @property
    def wanted(self) -> Wanted:
        return self.ticket.wanted


def numbers(most: int) -> list[int]:
    """How many slots there may be: 4, 8, 16, ... and the most. A step of fewer than 4 is not faster."""
    return [*(1 << power for power in range(2, most.bit_length()) if 1 << power < most), most]


class Batch:
    """Slots of one model in one format, and the jobs in them.

    Args:
        params: `serving_params` of a model that differs from this one in storages at most.
        most: slots, at most; each has `capacity` columns.
    """

    def __init__(self, model: Model, params: Params, capacity: int, most: int, format: str) -> None:
        self.model, self.params, self.how = model, params, model.how
        self.capacity, self.most, self.format = capacity, most, format
        self.stops = max(len(model.stop_tokens), 1)
        self.slots = vacant(model.spec, 1, capacity, self.stops)
        self.jobs: list[Job | None] = []

    def reset(self) -> None:
        """No jobs, and as few slots as there may be."""
        least = numbers(self.most)[0]
        self.slots = vacant(self.model.spec, least, self.capacity, self.stops)
        self.jobs = [None] * least

    def free(self) -> None:
        """Give the memory of the slots back; `reset` makes new ones."""
        self.jobs = []
        jax.tree.map(lambda x: x.delete(), self.slots)
        give_back_freed()

    @property
    def running(self) -> int:
        return sum(job is not None for job in self.jobs)

    @property
    def nbytes(self) -> int:
        return self.slots.cache.nbytes

    def read(self, job: Job, prefixes: Prefixes) -> bool:
        """Read the next piece of a job's prompt; whether that was the last."""
        config, spec = self.model.config, self.model.spec
        prompt = job.wanted.prompt
        if not job.pieces:
            job.reused, job.cache = prefixes.find(prompt)
            job.pieces = pieces(job.reused, len(prompt))
        first, last = job.pieces.pop(0)
        tokens, mask = padded(list(prompt[first:last]), config.pad_token_id)
        job.cache, job.hidden = read(
            config, spec, self.params, job.cache, tokens, mask, capacity=self.capacity, how=self.how
        )
        if not job.pieces:
            prefixes.keep(prompt, job.cache)
        return not job.pieces

    def begin(self, job: Job) -> tuple[Slots, Token]:
        """A job whose prompt was read, as a sequence to be put into a slot, and its first new token."""
        wanted, cache = job.wanted, job.cache
        assert cache is not None
        job.cache = None  # it is the slot's from now on
        stops = (*(self.model.stop_tokens if wanted.stop else ()), *[NEVER] * self.stops)[: self.stops]
        chosen = Sampling.checked(wanted.temperature, wanted.top_k, wanted.top_p)
        settings = (0.0, ALL, 1.0) if chosen.temperature is None else (chosen.temperature, chosen.top_k, chosen.top_p)
        asked = Slots(
            cache=cache,
            newest=jnp.zeros(1, jnp.int32),
            left=jnp.array([wanted.max_new_tokens], jnp.int32),
            keys=jax.random.key_data(keys_of(jnp.uint32(wanted.seed), np.array([wanted.number], np.uint32))),
            stops=jnp.array([stops], jnp.int32),
            sampling=Sampling(*(jnp.asarray([x], d) for x, d in zip(settings, KINDS, strict=True))),
            tells=jnp.array([wanted.alternatives > 0]),
        )
        one, told = begin(self.model.config, self.params, asked, job.hidden, how=self.how)
        tokens = self._tokens(jax.device_get(told), 0, wanted)
        return one, tokens[0]

    def put(self, job: Job, one: Slots) -> None:
        """Give a sequence a slot, with more slots if all are taken."""
        if None not in self.jobs:
            self._resize(min(number for number in numbers(self.most) if number > len(self.jobs)))
        slot = self.jobs.index(None)
        self.slots = insert(self.slots, one, jnp.int32(slot))
        self.jobs[slot] = job

    def step(self, most: int) -> list[tuple[Job, tuple[Token, ...], bool]]:
        """At most `most` tokens more of every job: which, and whether that was its last; it has left its slot then."""
        count = jnp.int32(min(most, MOST_STEPS))
        self.slots, told = step(self.model.config, self.model.spec, self.params, self.slots, count, how=self.how)
        told, left = jax.device_get((told, self.slots.left))
        made = []
        for slot, job in enumerate(self.jobs):
            if job is None:
                continue
            ended = left[slot] == 0
            made.append((job, self._tokens(told, slot, job.wanted), bool(ended)))
            if ended:
                self.jobs[slot] = None
        return made

    def remove(self, job: Job) -> None:
        """Take a job out of its slot."""
        slot = self.jobs.index(job)
        self.slots = dataclasses.replace(self.slots, left=release(self.slots.left, jnp.int32(slot)))
        self.jobs[slot] = None

    @property
    def fewer(self) -> int:
        """The next smaller number of slots; 0: there is none."""
        return max((number for number in numbers(self.most) if number < len(self.jobs)), default=0)

    def shrink(self) -> None:
        """As many slots as `fewer` says, if that is enough."""
        if 0 < self.fewer >= self.running:
            self._resize(self.fewer)

    def hand_over(self, to: "Batch") -> None:
        """Move all jobs to a batch of another format. What they have stored is on the host in between, so that the two
        caches are not there together."""
        jobs = [(slot, job) for slot, job in enumerate(self.jobs) if job is not None]
        moved = [(job, jax.device_get(take(self.slots, jnp.int32(slot)))) for slot, job in jobs]
        self.free()
        self.jobs = [job for job, _ in moved]  # until they are elsewhere: what fails in between loses none
        to.reset()
        for job, one in moved:
            to.put(job, recoded(one, before=self.model.spec, after=to.model.spec))
        self.jobs = []

    def _resize(self, count: int) -> None:
        taken = [slot for slot, job in enumerate(self.jobs) if job is not None]
        self.slots = resize(self.slots, taken, count)
        self.jobs = [*(self.jobs[slot] for slot in taken), *[None] * (count - len(taken))]
        give_back_freed()

    def _tokens(self, told: Told, slot: int, wanted: Wanted) -> tuple[Token, ...]:
        """What was told of one slot, on the host."""
        tokens, logprobs, likeliest, theirs = (
            np.reshape(each, (-1, *each.shape[-rank:]))[:, slot]
            for each, rank in ((told.tokens, 1), (told.logprobs, 1), (told.likeliest, 2), (told.their_logprobs, 2))
        )
        return tuple(
            Token(
                int(tokens[at]), float(logprobs[at]), self.format,
                _pairs(likeliest[at], theirs[at], wanted.alternatives),
            )
            for at in np.flatnonzero(tokens != NEVER)
        )  # fmt: skip

    def warm_up(self, onto: "Sequence[Batch]" = ()) -> None:
        """Compile all that jobs may need, by doing it: pieces of prompts, every number of slots, the move to others.

        Jobs that are there are lost.
        """
        prefixes, pad = Prefixes(0), self.model.config.pad_token_id

        def read_whole(length: int) -> Job:
            wanted = Wanted((pad,) * length, max_new_tokens=1 << 30, stop=False)
            job = Job(Ticket(wanted), lambda event: None, math.inf)
            while not self.read(job, prefixes):
                pass
            return job

        self.reset()
        sizes = [size for size in PIECES if size <= self.capacity]
        for length in (*sizes, *(CHUNK + size for size in sizes if CHUNK + size <= self.capacity)):
            upto(read_whole(length).cache, jnp.int32(0))
        held, tried = [], set()
        while self.running < self.most:
            job = read_whole(1)
            self.put(job, self.begin(job)[0])
            held.append(job)
            if len(self.jobs) not in tried:
                tried.add(len(self.jobs))
                self.step(1)
                take(self.slots, jnp.int32(0))
        while held:
            self.remove(held.pop())
            self.shrink()
        for other in onto:
            self.reset()
            job = read_whole(1)
            self.put(job, self.begin(job)[0])
            self.hand_over(other)
            other.free()
        self.reset()


KINDS = (jnp.float32, jnp.int32, jnp.float32)


def _pairs(tokens: np.ndarray, logprobs: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    some = zip(tokens[:count].tolist(), logprobs[:count].tolist(), strict=True)
    return tuple((token, logprob) for token, logprob in some if token != NEVER)
