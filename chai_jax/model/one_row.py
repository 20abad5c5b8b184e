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
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.block_store import BlockStore, fill, pad, quantized_as, with_sinks
from chai_jax.model.few_bits import FewBits, read_few
from chai_jax.model.quantized import dequantize


@partial(jax.tree_util.register_dataclass, data_fields=["store", "start", "real"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class OneRow:
    """What the token in column `start` reads of S columns: its own block in bfloat16, and so the first tokens."""

    # Any, because tree operations put other things (shapes, shardings) in their places.
    store: Any  # a BlockStore that has the token
    start: Any  # int32 []
    real: Any  # bool [B, S]: which columns hold tokens, this one among them

    def expanded(self, dtype: DTypeLike) -> Float[Array, "B heads S R"]:
        """All columns in `dtype`, for attention that knows no blocks."""
        store, columns = self.store, self.real.shape[1]
        batch, heads, block, rank = store.recent.shape
        blocks = store.blocks
        read = read_few(blocks).astype(dtype) if isinstance(blocks, FewBits) else dequantize(blocks, dtype)
        old = pad(read.reshape(batch, heads, -1, rank), 2, block)  # the last block may be cut off
        if store.sinks is not None:
            old = with_sinks(old, store.sinks, numbered(self.real))
        base = self.start // block * block
        return jax.lax.dynamic_update_slice_in_dim(old, store.recent.astype(dtype), base, axis=2)[:, :, :columns]


def numbered(real: Bool[Array, "B S"]) -> Int32[Array, "B S"]:
    """Which of its sequence's tokens a column holds, from 0; -1 where it holds none."""
    return jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)


def append_row(
    past: BlockStore, x: Float[Array, "B heads 1 R"], start: Int32[Array, ""], real: Bool[Array, "B S"]
) -> BlockStore:
    """The store with one token more, in column `start`; `real` as of `append_blocks`.

    On CPUs what is seldom written is a loop of one turn or none, which XLA runs in place and only then. Accelerators
    would wait for its condition: they compute the block each time, and write the old one again where it is not whole.
    """
    by_cpu, by_others = (partial(_append_row, seldom=seldom) for seldom in (_in_loop, _branchless))
    after: BlockStore = jax.lax.platform_dependent(past, x, start, real, cpu=by_cpu, default=by_others)
    return after


Change = Callable[[Any], Any]
Seldom = Callable[[Array, Change, Any], Any]


def _in_loop(when: Array, change: Change, x: Any) -> Any:
    """`change(x)` or x, as `when` says."""
    return jax.lax.while_loop(lambda carried: carried[0], lambda carried: (~when, change(carried[1])), (when, x))[1]


def _branchless(when: Array, change: Change, x: Any) -> Any:
    return jax.tree.map(partial(jnp.where, when), change(x), x)


def _append_row(past: BlockStore, x: Array, start: Array, real: Array, *, seldom: Seldom) -> BlockStore:
    block = past.recent.shape[2]
    used, at = start % block, start // block
    recent = seldom(used == 0, jnp.zeros_like, past.recent)
    always = start >= 0  # in a loop too: else XLA for CPUs makes all of it float32 and back
    put = partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
    recent = seldom(always, lambda old: put(old, x.astype(jnp.bfloat16), used), recent)
    number, sinks, whole = numbered(real), past.sinks, 0
    if sinks is not None:
        whole = sinks.shape[2]
        mine = jax.lax.dynamic_slice_in_dim(number, start, 1, axis=1) == jnp.arange(whole, dtype=jnp.int32)
        new = x.astype(jnp.bfloat16)
        sinks = seldom(mine.any(), lambda old: jnp.where(mine[:, None, :, None], new, old), sinks)
    if jax.tree.leaves(past.blocks)[0].shape[2] == 0:  # less than a block in all
        return BlockStore(past.blocks, recent, sinks)

    def entry() -> Any:
        held = jax.lax.dynamic_slice_in_dim(pad(number >= whole, 1, block), at * block, block, axis=1)
        return quantized_as(fill(recent, held, block).astype(jnp.float32), past.blocks)

    def write(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda each, part: put(each, part, at), old, new)

    complete = used == block - 1
    if seldom is _in_loop:
        return BlockStore(_in_loop(complete, lambda old: write(old, entry()), past.blocks), recent, sinks)
    there = jax.tree.map(lambda each: jax.lax.dynamic_slice_in_dim(each, at, 1, axis=2), past.blocks)
    return BlockStore(write(past.blocks, _branchless(complete, lambda _: entry(), there)), recent, sinks)
