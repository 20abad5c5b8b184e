"""The device's side of serving: sequences in slots, each with its own length and settings, and the programs on them.

`read` reads a prompt into a cache of one sequence, piece by piece; `begin` chooses its first token; `insert` puts it
into a slot; `step` makes further tokens of all slots. What a slot holds depends on no other slot.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.cache import Cache, empty, extend
from chai_jax.model.decoder import forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.serve.decode import NEVER
from chai_jax.serve.job import MOST_ALTERNATIVES
from chai_jax.serve.sample import ALL, Sampling, sample_rows

CHUNK = 256  # tokens of a prompt that are read at once, at most
PIECES = (64, 128, CHUNK)  # their number is rounded up to one of these, so that few programs are compiled
MOST_STEPS = 4  # tokens a sequence, that one call of `step` makes at most


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "newest", "left", "keys", "stops", "sampling", "tells"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Slots:
    """Sequences between two steps; the leading axis of every array is that of the B slots.

    Attributes:
        cache: of all tokens but the newest.
        newest: the token to read next.
        left: tokens to make still; of a slot that is free, or whose text has ended, 0.
        keys: for each sequence's next draw, as `jax.random.key_data`.
        stops: tokens that end a text; `NEVER` is none.
        sampling: each sequence's own three numbers; temperature 0 is greedy.
        tells: whether the likeliest tokens of each place are wanted.
    """

    cache: Cache
    newest: Any  # int32 [B]
    left: Any  # int32 [B]
    keys: Any  # uint32 [B, 2]
    stops: Any  # int32 [B, E]
    sampling: Sampling
    tells: Any  # bool [B]

    @property
    def count(self) -> int:
        return int(self.newest.shape[0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Told:
    """Tokens that were made, [..., B], and what is told of them.

    Attributes:
        tokens: `NEVER` where none was made.
        logprobs: of these tokens, by the model's own distribution.
        likeliest, their_logprobs: [..., B, MOST_ALTERNATIVES], likeliest first; zeros where no slot `tells`.
    """

    tokens: Any
    logprobs: Any
    likeliest: Any
    their_logprobs: Any


def capacity_of(context: int) -> int:
    """Columns that a slot of `context` tokens needs: pieces of a prompt are rounded up, and have to fit too."""
    small = next((size for size in PIECES if size >= context), None)
    return small or -(-context // CHUNK) * CHUNK


def pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """Where to cut the tokens `start` (a multiple of the smallest piece) to `stop` of a prompt.

    Rounded up to `PIECES`, a piece stays within a multiple of CHUNK, and so within the slot.
    """
    cuts = [start]
    while cuts[-1] < stop:
        size = PIECES[0] if cuts[-1] % CHUNK else CHUNK
        cuts.append(min(cuts[-1] + size, stop))
    return [*pairwise(cuts)]


def padded(tokens: list[int], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """A piece of a prompt as int32 [1, T] and bool [1, T]; T is one of `PIECES`."""
    size = next(size for size in PIECES if size >= len(tokens))
    row = np.full((1, size), pad, np.int32)
    row[0, : len(tokens)] = tokens
    return row, np.arange(size)[None] < len(tokens)


@partial(jax.jit, static_argnames=("config", "spec", "capacity", "how"), donate_argnames="cache")
def read(
    config: Architecture,
    spec: Spec,
    params: Params,
    cache: Cache | None,
    tokens: Int32[Array, "1 T"],
    mask: Bool[Array, "1 T"],
    *,
    capacity: int,
    how: Execution,
) -> tuple[Cache, Float[Array, "1 1 D"]]:
    """A piece of a prompt: the cache of one sequence after it, and its last hidden state.

    Args:
        cache: of the pieces before, which is used up; None before the first, whose cache gets room for `capacity`.
    """
    newest = mask.sum(axis=1, keepdims=True, dtype=jnp.int32) - 1
    output = forward(config, spec, params, tokens, mask, how, cache=cache, wanted=newest)
    return extend(output.cache, capacity) if cache is None else output.cache, output.hidden


@partial(jax.jit, static_argnames=("config", "how"), donate_argnames="asked")
def begin(
    config: Architecture, params: Params, asked: Slots, hidden: Float[Array, "1 1 D"], *, how: Execution
) -> tuple[Slots, Told]:
    """The first token of a prompt that was read, `asked.cache` being its cache."""
    return _choose(config, params, hidden, asked, how)


@partial(jax.jit, static_argnames=("config", "spec", "how"), donate_argnames="slots")
def step(
    config: Architecture, spec: Spec, params: Params, slots: Slots, most: Int32[Array, ""], *, how: Execution
) -> tuple[Slots, Told]:
    """At most `most` (itself at most MOST_STEPS) tokens more of every sequence that has not ended."""
    told = jax.tree.map(lambda x: jnp.zeros((MOST_STEPS, *x.shape), x.dtype), _nothing(slots.count))
    told = dataclasses.replace(told, tokens=jnp.full_like(told.tokens, NEVER))

    def further(state: tuple[Array, Slots, Told]) -> Array:
        at, slots, _ = state
        return (at < most) & (slots.left > 0).any()

    def one(state: tuple[Array, Slots, Told]) -> tuple[Array, Slots, Told]:
        at, slots, told = state
        live = (slots.left > 0)[:, None]
        output = forward(config, spec, params, slots.newest[:, None], live, how, cache=slots.cache)
        slots, new = _choose(config, params, output.hidden, dataclasses.replace(slots, cache=output.cache), how)
        return at + 1, slots, jax.tree.map(lambda all, each: all.at[at].set(each), told, new)

    _, slots, told = jax.lax.while_loop(further, one, (jnp.int32(0), slots, told))
    return slots, told


def _nothing(count: int) -> Told:
    some = (count, MOST_ALTERNATIVES)
    return Told(jnp.zeros(count, jnp.int32), jnp.zeros(count), jnp.zeros(some, jnp.int32), jnp.zeros(some, jnp.float32))


def _choose(
    config: Architecture, params: Params, hidden: Float[Array, "B 1 D"], slots: Slots, how: Execution
) -> tuple[Slots, Told]:
    logits = unembed(config, params, hidden[:, -1], how)
    keys = jax.vmap(jax.random.split)(jax.random.wrap_key_data(slots.keys))
    live = slots.left > 0
    tokens = sample_rows(logits, keys[:, 1], slots.sampling)
    ended = (tokens[:, None] == slots.stops).any(axis=1)
    left = jnp.where(live & ~ended, slots.left - 1, 0)
    # What has ended is not read any more: attention passes over a cache of length 0.
    cache = dataclasses.replace(slots.cache, length=jnp.where(left > 0, slots.cache.length, 0))
    after = dataclasses.replace(
        slots,
        cache=cache,
        newest=jnp.where(live, tokens, slots.newest),
        left=left,
        keys=jax.random.key_data(keys[:, 0]),
    )

    def likeliest() -> tuple[Array, Array]:
        found, at = jax.lax.top_k(logits - scale, some)
        room = [(0, 0), (0, MOST_ALTERNATIVES - some)]
        return jnp.pad(at, room, constant_values=NEVER), jnp.pad(found, room)

    scale = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    some, nothing = min(MOST_ALTERNATIVES, logits.shape[-1]), _nothing(slots.count)
    logprobs = (jnp.take_along_axis(logits, tokens[:, None], axis=1) - scale)[:, 0]
    at, found = jax.lax.cond((live & slots.tells).any(), likeliest, lambda: (nothing.likeliest, nothing.their_logprobs))
    return after, Told(jnp.where(live, tokens, NEVER), logprobs, at, found)


@partial(jax.jit, donate_argnames="slots")
def insert(slots: Slots, one: Slots, slot: Int32[Array, ""]) -> Slots:
    """The slots with `one` (a single sequence) in place of what the slot held."""
    put = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.tree.map(lambda old, new: _in_bits(put, old, new, slot), slots, one)


@jax.jit
def take(slots: Slots, slot: Int32[Array, ""]) -> Slots:
    """The single sequence in a slot; the slots stay."""
    cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=1, axis=0)
    return jax.tree.map(lambda x: _in_bits(cut, x, slot), slots)


@partial(jax.jit, donate_argnames="left")
def release(left: Int32[Array, "B"], slot: Int32[Array, ""]) -> Int32[Array, "B"]:
    """`Slots.left` with nothing left to make in one slot."""
    return left.at[slot].set(0)


@partial(jax.jit, static_argnames="count")
def _moved(x: Array, order: Int32[Array, "N"], count: int) -> Array:
    """x with `count` rows: the first are the rows `order`; zeros for those that x does not have, and behind them."""

    def move(x: Array, order: Array) -> Array:
        read = jnp.take(x, order, axis=0, mode="fill", fill_value=0)
        return jnp.pad(read, [(0, count - len(order)), *[(0, 0)] * (x.ndim - 1)])

    return _in_bits(move, x, order)


def resize(slots: Slots, order: list[int], count: int) -> Slots:
    """`count` slots, of which the first hold the sequences that were in the slots `order`.

    `slots` are used up, array by array: beside the slots themselves one array is there twice, not all of them.
    """
    leaves, structure = jax.tree.flatten(slots)
    # Of few lengths, since programs are compiled for them; behind `order` rows that there are not.
    rows = np.full(min(count, slots.count), slots.count, np.int32)
    rows[: len(order)] = order
    for at, leaf in enumerate(leaves):
        leaves[at] = _moved(leaf, rows, count)
        leaves[at].block_until_ready()
        leaf.delete()
    resized: Slots = jax.tree.unflatten(structure, leaves)
    return resized


def _in_bits(function: Callable[..., Array], *arrays: Array) -> Array:
    """`function(*arrays)`, which moves entries and computes nothing; on CPUs it moves bfloat16 as integers.

    XLA for CPUs knows no bfloat16 and would turn all of a cache to float32 and back. XLA for TPUs would turn the bits
    of a cache around.
    """

    def by_bits(*arrays: Array) -> Array:
        whole = [jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x for x in arrays]
        return jax.lax.bitcast_convert_type(function(*whole), jnp.bfloat16)

    if arrays[0].dtype != jnp.bfloat16:
        return function(*arrays)
    moved: Array = jax.lax.platform_dependent(*arrays, cpu=by_bits, default=function)
    return moved


def vacant(spec: Spec, count: int, capacity: int, stops: int) -> Slots:
    """Slots without sequences, of which each may have up to `stops` tokens that end its text."""
    return Slots(
        cache=empty(spec, count, capacity),
        newest=jnp.zeros(count, jnp.int32),
        left=jnp.zeros(count, jnp.int32),
        keys=jnp.zeros((count, 2), jnp.uint32),
        stops=jnp.full((count, stops), NEVER, jnp.int32),
        sampling=Sampling(jnp.zeros(count), jnp.full(count, ALL, jnp.int32), jnp.ones(count)),
        tells=jnp.zeros(count, bool),
    )
