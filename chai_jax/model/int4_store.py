"""int4 storage of keys or values: whole blocks of columns in int4, the block in progress in bfloat16.

As KIVI does (Liu et al. 2024, arXiv 2402.02750), keys are quantized per channel over the columns of a block, since
their outliers keep to channels, and values per token over groups of channels. A scale over columns needs all of them at
hand. So a block is quantized once, when its last column is written, and its tokens stay in bfloat16 until then.

What a token reads depends on columns alone: int4 in the blocks before its own, bfloat16 in its own block. So prefill,
training and decoding read the same numbers, and of a text shorter than a block all is bfloat16. Masked columns take up
their place in a block but do not enter its scales. Padding on the right changes nothing; padding on the left moves the
borders of the blocks along the text, unless it is a multiple of `BLOCK`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.quantized import dequantize, quantize_int4

BLOCK = 32  # columns of a block, which share a key's scale; also the channels that share a value's
BY_CHANNEL, BY_TOKEN = -2, -1  # axes of [B, heads, N, BLOCK, R] along which keys and values are grouped


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "recent"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class BlockStore:
    """Keys or values of a cache of S columns: N = S // BLOCK blocks, and the block last written to."""

    # Any, because tree operations put other things (shapes, shardings) in their places.
    blocks: Any  # Int4Array [B, heads, N, BLOCK, R]; one not yet complete holds zeros
    recent: Any  # bfloat16 [B, heads, BLOCK, R]; column s is at s % BLOCK

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.recent.nbytes


@partial(jax.tree_util.register_dataclass, data_fields=["old", "recent", "fresh"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Windowed:
    """What T rows read of S columns: `recent` where row and column are of one block (`fresh`), else `old`."""

    old: Any  # [B, heads, S, R], read back from int4
    recent: Any  # [B, heads, S, R], as `old` but for the rows' own blocks, read back from bfloat16
    fresh: Any  # bool [T, S]

    def upto(self, rows: slice) -> "Windowed":
        """The part that these rows read: no column behind the last of them."""
        old, recent = (part[:, :, : rows.stop] for part in (self.old, self.recent))
        return Windowed(old, recent, self.fresh[rows, : rows.stop])


def of_rows(stored: Any, rows: Int32[Array, "B N"] | None) -> Any:
    """What some of the rows read of keys or values.

    Args:
        stored: for all rows; only a `Windowed` differs from row to row.
        rows: of each sequence the rows that are wanted; all, if not given.
    """
    if rows is None or not isinstance(stored, Windowed):
        return stored
    return dataclasses.replace(stored, fresh=stored.fresh[rows][:, None, None])


def empty_blocks(batch: int, heads: int, capacity: int, rank: int, axis: int) -> BlockStore:
    """A store of `capacity` columns; `axis` is BY_CHANNEL for keys, BY_TOKEN for values."""
    columns = jax.ShapeDtypeStruct((batch, heads, capacity // BLOCK, BLOCK, rank), jnp.float32)
    shapes = jax.eval_shape(partial(quantize_int4, axis=axis, group=BLOCK), columns)
    blocks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return BlockStore(blocks, jnp.zeros((batch, heads, BLOCK, rank), jnp.bfloat16))


def extend_blocks(past: BlockStore, capacity: int) -> BlockStore:
    """The same store with room for `capacity` columns."""
    room = capacity // BLOCK - past.blocks.shape[2]
    return BlockStore(jax.tree.map(lambda x: pad(x, 2, room), past.blocks), past.recent)


def append_blocks(
    past: BlockStore, x: Float[Array, "B heads T R"], start: Int32[Array, ""], real: Bool[Array, "B S"]
) -> tuple[BlockStore, Windowed]:
    """The store with T more tokens in columns `start`..., and what each of these T rows reads, in x's dtype.

    Args:
        real: which columns hold real tokens, the new ones included.
    """
    rows, columns = x.shape[2], real.shape[1]
    touched = -(-(BLOCK - 1 + rows) // BLOCK)  # blocks, at most
    first = start // BLOCK
    base = first * BLOCK
    window = _window(past.recent, x, start - base, touched * BLOCK)

    numbers = first + jnp.arange(touched, dtype=jnp.int32)
    complete = (numbers + 1) * BLOCK <= start + rows
    held = jax.lax.dynamic_slice_in_dim(pad(real, 1, touched * BLOCK), base, touched * BLOCK, axis=1)
    new = quantize_int4(_fill(window, held).astype(jnp.float32), past.blocks.axis, BLOCK)
    place = jnp.where(complete, numbers, columns)  # beyond all blocks: dropped
    blocks = jax.tree.map(lambda old, entry: old.at[:, :, place].set(entry, mode="drop"), past.blocks, new)
    last = (start + rows - 1) // BLOCK * BLOCK - base
    after = BlockStore(blocks, jax.lax.dynamic_slice_in_dim(window, last, BLOCK, axis=2))

    old = dequantize(blocks, x.dtype).reshape(*x.shape[:2], -1, x.shape[3])
    old = pad(old, 2, touched * BLOCK)
    recent = jax.lax.dynamic_update_slice_in_dim(old, window.astype(x.dtype), base, axis=2)
    own = (start + jnp.arange(rows, dtype=jnp.int32)) // BLOCK
    fresh = own[:, None] == jnp.arange(columns, dtype=jnp.int32) // BLOCK
    return after, Windowed(old[:, :, :columns], recent[:, :, :columns], fresh)


def _window(recent: Array, x: Array, used: Array, width: int) -> Array:
    """bfloat16 [B, heads, width, R]: the `used` columns of the block in progress, then the new ones, then zeros."""
    kept = jnp.where(jnp.arange(BLOCK, dtype=jnp.int32)[:, None] < used, recent, jnp.zeros_like(recent))
    window = pad(kept, 2, width - BLOCK)
    return jax.lax.dynamic_update_slice_in_dim(window, x.astype(jnp.bfloat16), used, axis=2)


def _fill(window: Array, real: Array) -> Array:
    """The window as blocks [B, heads, N, BLOCK, R], masked columns replaced by the largest real entry of the block."""
    blocks = window.reshape(*window.shape[:2], -1, BLOCK, window.shape[3])
    mask = real.reshape(real.shape[0], 1, -1, BLOCK, 1)
    largest = jnp.max(blocks, axis=-2, keepdims=True, where=mask, initial=-jnp.inf)
    largest = jnp.where(mask.any(axis=-2, keepdims=True), largest, jnp.zeros_like(largest))
    return jnp.where(mask, blocks, largest)


def pad(x: Array, axis: int, room: int) -> Array:
    """`room` zeros more behind an axis."""
    return jnp.pad(x, [(0, room if at == axis else 0) for at in range(x.ndim)])
