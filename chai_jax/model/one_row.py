"""A cache of blocks while it decodes: one token more, and what its row reads, which is the store itself.

It computes what `block_store.append_blocks` does for one token. But nothing is read back from few bits that a kernel
can read as it is stored, and no block is quantized before its last column is there.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import layout as memory
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.block_store import AS_IS, BlockStore, Codec, fill, pad, read_blocks, with_sinks
from chai_jax.model.by_row import put_rows, slice_rows
from chai_jax.model.execution import Execution
from chai_jax.model.kernels.write import put_tokens


@partial(jax.tree_util.register_dataclass, data_fields=["store", "start", "real"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class OneRow:
    """What each sequence's token in column `start` reads of S columns: its own block in bfloat16, and so the first
    tokens."""

    # Any, because tree operations put other things (shapes, shardings) in their places.
    store: Any  # a BlockStore that has the token
    start: Any  # int32 [B]
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
        return put_rows(old, store.recent.astype(dtype), base, axis=2)[:, :, :columns]


def numbered(real: Bool[Array, "B S"]) -> Int32[Array, "B S"]:
    """Which of its sequence's tokens a column holds, from 0; -1 where it holds none."""
    return jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)


def append_row(
    past: BlockStore,
    x: Float[Array, "B heads 1 R"],
    start: Int32[Array, "B"],
    real: Bool[Array, "B S"],
    codec: Codec = AS_IS,
    how: Execution | None = None,
) -> BlockStore:
    """The store with one token more in each sequence's column `start`; `real` and `codec` as of `append_blocks`.

    On CPUs blocks are written in a loop, of no turn mostly, which XLA runs in place. Accelerators would wait for its
    condition: they compute each sequence's block every time, and write the old one again where it is not whole.
    """
    block, new = past.recent.shape[2], x.astype(jnp.bfloat16)
    recent = put_tokens(past.recent, new, start % block, how)
    number, sinks = numbered(real), past.sinks
    if sinks is not None:
        mine = slice_rows(number, start, 1, axis=1) == jnp.arange(sinks.shape[2], dtype=jnp.int32)
        sinks = jnp.where(mine[:, None, :, None], new, sinks)
    if jax.tree.leaves(past.blocks)[0].shape[2] == 0:  # less than a block in all
        return BlockStore(past.blocks, recent, sinks)
    held = number >= (0 if sinks is None else sinks.shape[2])
    complete = (start % block == block - 1) & slice_rows(real, start, 1, axis=1)[:, 0]
    by_cpu, by_others = (partial(each, codec=codec) for each in (_one_by_one, _all_at_once))
    blocks = jax.lax.platform_dependent(
        past.blocks, recent, held, start // block, complete, cpu=by_cpu, default=by_others
    )
    return BlockStore(blocks, recent, sinks)


def _stored(blocks: Any, recent: Array, held: Array, number: Array, codec: Codec) -> Any:
    """Each sequence's block in progress, which has this number, as it is stored."""
    block = recent.shape[2]
    held = slice_rows(pad(held, 1, block), number * block, block, axis=1)
    return codec.quantize(fill(codec.encode(recent, number), held, block).astype(jnp.float32), blocks)


def _one_by_one(blocks: Any, recent: Array, held: Array, number: Array, complete: Array, *, codec: Codec) -> Any:
    """The blocks with those that are complete, one turn each."""
    order = jnp.argsort(~complete, stable=True).astype(jnp.int32)

    def turn(at: Array, blocks: Any) -> Any:
        row = order[at]
        own = [jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0) for x in (recent, held, number)]
        new = _stored(blocks, own[0], own[1], own[2], codec.of(row))
        return jax.tree.map(lambda old, part: _put_block(old, part, row, own[2][0]), blocks, new)

    return jax.lax.fori_loop(jnp.int32(0), complete.sum(dtype=jnp.int32), turn, blocks)


def _put_block(old: Array, part: Array, row: Array, number: Array) -> Array:
    first = jnp.int32(0)
    return jax.lax.dynamic_update_slice(old, part, (row, first, number, *[first] * (old.ndim - 3)))


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


def _all_at_once(blocks: Any, recent: Array, held: Array, number: Array, complete: Array, *, codec: Codec) -> Any:
    new = _stored(blocks, recent, held, number, codec)

    def write(old: Array, part: Array) -> Array:
        old = _as_it_lies(old)
        kept = slice_rows(old, number, 1, axis=2)
        new = jnp.where(complete.reshape(-1, *[1] * (old.ndim - 1)), part, kept)
        return _as_it_lies(put_rows(old, new, number, axis=2))

    return jax.tree.map(write, blocks, new)
