"""A cache of blocks while it decodes: one token more, and what its row reads, which is the store itself.

It computes what `block_store.append_blocks` does for one token. But nothing is read back from few bits that a kernel
can read as it is stored, and no block is quantized before its last column is there.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import layout as memory
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.block_store import AS_IS, BlockStore, Codec, fill, pad, read_blocks, with_sinks


@partial(jax.tree_util.register_dataclass, data_fields=["store", "start", "real"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class OneRow:
    """What the token in column `start` reads of S columns: its own block in bfloat16, and so the first tokens."""

    # Any, because tree operations put other things (shapes, shardings) in their places.
    store: Any  # a BlockStore that has the token
    start: Any  # int32 []
    real: Any  # bool [B, S]: which columns hold tokens, this one among them

    def expanded(self, dtype: DTypeLike, codec: Codec = AS_IS) -> Float[Array, "B heads S R"]:
        """All columns in `dtype`, for attention that knows no blocks."""
        store, columns = self.store, self.real.shape[1]
        batch, heads, block, rank = store.recent.shape
        read = codec.decode(read_blocks(store.blocks)).astype(dtype)
        old = pad(read.reshape(batch, heads, -1, rank), 2, block)  # the last block may be cut off
        if store.sinks is not None:
            old = with_sinks(old, store.sinks, numbered(self.real))
        base = self.start // block * block
        return jax.lax.dynamic_update_slice_in_dim(old, store.recent.astype(dtype), base, axis=2)[:, :, :columns]


def numbered(real: Bool[Array, "B S"]) -> Int32[Array, "B S"]:
    """Which of its sequence's tokens a column holds, from 0; -1 where it holds none."""
    return jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)


def append_row(
    past: BlockStore,
    x: Float[Array, "B heads 1 R"],
    start: Int32[Array, ""],
    real: Bool[Array, "B S"],
    codec: Codec = AS_IS,
) -> BlockStore:
    """The store with one token more, in column `start`; `real` and `codec` as of `append_blocks`.

    On CPUs what is seldom written is a loop of one turn or none, which XLA runs in place and only then. Accelerators
    would wait for its condition: they compute the block each time, and write the old one again where it is not whole.
    """
    by_cpu, by_others = (partial(_append_row, codec=codec, loops=loops) for loops in (True, False))
    after: BlockStore = jax.lax.platform_dependent(past, x, start, real, cpu=by_cpu, default=by_others)
    return after


# What becomes of x, given the column that is written.
Change = Callable[[Any, Array], Any]


def _in_loop(when: Array, change: Change, x: Any, start: Array) -> Any:
    """`change(x, start)` where `when` says so, else x.

    The column is the loop's counter: what a change computes from it alone, XLA cannot compute before the loop, at every
    token and for nothing.
    """
    first = jnp.where(when, start, start + 1)
    return jax.lax.while_loop(lambda c: c[0] <= start, lambda c: (c[0] + 1, change(c[1], c[0])), (first, x))[1]


def _branchless(when: Array, change: Change, x: Any, start: Array) -> Any:
    return jax.tree.map(partial(jnp.where, when), change(x, start), x)


def _as_it_lies(x: Array) -> Array:
    """On GPUs and TPUs, keep the order that an array of blocks has outside of a program; else this does nothing.

    Left alone, XLA for GPUs gives the planes of keys the order that packing makes them in, and copies all of them to
    the kernel's at every token; and XLA for TPUs puts the few scales of an int4 value along the lanes, where they take
    up 32 to 64 times their size.
    """
    rows = tuple(range(x.ndim))
    few = x.ndim == 5 and x.dtype == jnp.bfloat16  # scales of int4, [B, heads, N, 1, R] or [B, heads, N, M, R / 32]
    on_tpu = ((0, 1, 3, 2, 4) if x.shape[3] == 1 else (0, 1, 3, 4, 2)) if few else None

    def pin(x: Array, order: tuple[int, ...] | None) -> Array:
        return x if order is None else memory.with_layout_constraint(x, memory.Layout(major_to_minor=order))

    pinned: Array = jax.lax.platform_dependent(
        x, cuda=partial(pin, order=rows), tpu=partial(pin, order=on_tpu), default=lambda x: x
    )
    return pinned


def _append_row(
    past: BlockStore, x: Array, start: Array, real: Array, *, loops: bool, codec: Codec = AS_IS
) -> BlockStore:
    block, new, put = past.recent.shape[2], x.astype(jnp.bfloat16), partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
    used, seldom = start % block, _in_loop if loops else _branchless
    recent = seldom(used == 0, lambda old, _: jnp.zeros_like(old), past.recent, start)
    # This too in a loop: else XLA for CPUs makes float32 of all of it, and bfloat16 of that.
    recent = seldom(start >= 0, lambda old, at: put(old, new, at % block), recent, start)
    number, sinks, whole = numbered(real), past.sinks, 0
    if sinks is not None:
        whole = sinks.shape[2]
        mine = jax.lax.dynamic_slice_in_dim(number, start, 1, axis=1) == jnp.arange(whole, dtype=jnp.int32)
        sinks = seldom(mine.any(), lambda old, _: jnp.where(mine[:, None, :, None], new, old), sinks, start)
    if jax.tree.leaves(past.blocks)[0].shape[2] == 0:  # less than a block in all
        return BlockStore(past.blocks, recent, sinks)

    def stored(at: Array) -> Any:
        """The block of column `at`."""
        window, at = jax.lax.optimization_barrier((recent, at))  # so that the window too is of the loop
        held = jax.lax.dynamic_slice_in_dim(pad(number >= whole, 1, block), at // block * block, block, axis=1)
        encoded = codec.encode(window, at // block)
        return codec.quantize(fill(encoded, held, block).astype(jnp.float32), past.blocks)

    def write(old: Any, new: Any, at: Array) -> Any:
        return jax.tree.map(lambda each, part: put(each, part, at // block), old, new)

    complete = used == block - 1
    if loops:
        blocks = _in_loop(complete, lambda old, at: write(old, stored(at), at), past.blocks, start)
    else:
        old = jax.tree.map(_as_it_lies, past.blocks)
        there = jax.tree.map(lambda each: jax.lax.dynamic_slice_in_dim(each, start // block, 1, axis=2), old)
        new = _branchless(complete, lambda _, at: stored(at), there, start)
        blocks = jax.tree.map(_as_it_lies, write(old, new, start))
    return BlockStore(blocks, recent, sinks)
