"""Keys or values in whole blocks of columns of few bits, the block in progress in bfloat16.

A scale over columns, as keys have, needs all of them at hand. So a block is quantized once, when its last column is
written, and its tokens stay in bfloat16 until then. A format's `sinks`, the first tokens of a sequence, stay so for
good.

What a token reads depends on columns alone: few bits in the blocks before its own, bfloat16 in its own block. So
prefill, training and decoding read the same numbers, and of a text shorter than a block all is bfloat16. Masked columns
between tokens take up their place in a block but do not enter its scales, nor do sinks. Padding on the right changes
nothing, and a block is whole when its sequence's own tokens have filled it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.by_row import Starts, put_rows, slice_rows
from chai_jax.model.channel_bits import ChannelBits, quantize_channels, read_channels
from chai_jax.model.few_bits import FewBits, quantize_few, read_few
from chai_jax.model.quantized import Int4Array, dequantize, quantize_int4
from chai_jax.plans.channels import count_channels
from chai_jax.plans.formats import GRID, Blocks, Side


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "recent", "sinks"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class BlockStore:
    """Keys or values of a cache of S columns: N = S // M blocks of M columns, the block last written to, the sinks."""

    # Any, because tree operations put other things (shapes, shardings) in their places.
    blocks: Any  # Int4Array, FewBits or ChannelBits [B, heads, N, M, R]; one not yet complete holds zeros
    recent: Any  # bfloat16 [B, heads, M, R]; column s is at s % M
    sinks: Any  # bfloat16 [B, heads, sinks, R], the first real tokens; None where the format has none

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@partial(jax.tree_util.register_dataclass, data_fields=["old", "recent", "fresh"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Windowed:
    """What T rows read of S columns: `recent` where row and column are of one block (`fresh`), else `old`."""

    old: Any  # [B, heads, S, R], read back from few bits
    recent: Any  # [B, heads, S, R], as `old` but for the rows' own blocks, read back from bfloat16
    fresh: Any  # bool [B or 1, T, S]

    def upto(self, rows: slice) -> "Windowed":
        """The part that these rows read: no column behind the last of them."""
        part = self.each(lambda x: x[:, :, : rows.stop])
        return Windowed(part.old, part.recent, self.fresh[:, rows, : rows.stop])

    def each(self, function: Callable[[Array], Array]) -> "Windowed":
        """A function of `old` and of `recent`."""
        return Windowed(function(self.old), function(self.recent), self.fresh)


def of_rows(stored: Any, rows: Int32[Array, "B N"] | None) -> Any:
    """What some of the rows read of keys or values.

    Args:
        stored: for all rows; only a `Windowed` differs from row to row.
        rows: of each sequence the rows that are wanted; all, if not given.
    """
    if rows is None or not isinstance(stored, Windowed):
        return stored
    return dataclasses.replace(stored, fresh=jnp.take_along_axis(stored.fresh, rows[:, :, None], axis=1))


def quantized(x: Float[Array, "B heads N M R"], side: Side) -> Int4Array | FewBits | ChannelBits:
    """Whole blocks as they are stored."""
    if side.parts:
        return quantize_channels(x, side.parts)
    return quantize_int4(x, side.along, GRID) if side.scales == "grid" else quantize_few(x, side)


def quantized_as(x: Float[Array, "B heads N M R"], like: Any) -> Any:
    """Whole blocks in the format of others, of which only the structure is read."""
    if isinstance(like, ChannelBits):
        return quantize_channels(x, like.parts)
    return quantize_few(x, like.side) if isinstance(like, FewBits) else quantize_int4(x, like.axis, like.group)


def read_blocks(blocks: Any) -> Float[Array, "B heads N M R"]:
    """What was quantized, in float32."""
    if isinstance(blocks, ChannelBits):
        return read_channels(blocks)
    return read_few(blocks) if isinstance(blocks, FewBits) else dequantize(blocks)


@runtime_checkable
class Codec(Protocol):
    """What is done to keys or values before they are quantized, and undone after."""

    def encode(self, window: Float[Array, "B heads W R"], first: Starts) -> Float[Array, "B heads W n"]:
        """What is quantized of whole blocks of columns, of which the first is block `first` of the cache."""
        ...

    def of(self, row: Int32[Array, ""]) -> "Codec":
        """What is done to one sequence alone."""
        ...

    def quantize(self, blocks: Float[Array, "B heads N M n"], like: Any) -> Any:
        """See `quantized_as`."""
        ...

    def decode(self, blocks: Float[Array, "B heads N M n"]) -> Float[Array, "B heads N M R"]:
        """All of the cache's blocks again, from what was read back."""
        ...


class AsIs:
    """Keys or values are quantized as they are."""

    def encode(self, window: Array, first: Array) -> Array:
        return window

    def of(self, row: Array) -> "AsIs":
        return self

    def quantize(self, blocks: Array, like: Any) -> Any:
        return quantized_as(blocks, like)

    def decode(self, blocks: Array) -> Array:
        return blocks


AS_IS = AsIs()


def empty_blocks(batch: int, heads: int, capacity: int, rank: int, format: Blocks, side: Side) -> BlockStore:
    """A store of `capacity` columns; `side` is the format's `keys` or `values`."""
    channels = count_channels(side.parts) or rank
    columns = jax.ShapeDtypeStruct((batch, heads, capacity // format.block, format.block, channels), jnp.float32)
    shapes = jax.eval_shape(partial(quantized, side=side), columns)
    blocks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    recent, sinks = (jnp.zeros((batch, heads, size, rank), jnp.bfloat16) for size in (format.block, format.sinks))
    return BlockStore(blocks, recent, sinks if format.sinks else None)


def extend_blocks(past: BlockStore, capacity: int) -> BlockStore:
    """The same store with room for `capacity` columns."""
    room = capacity // past.recent.shape[2] - jax.tree.leaves(past.blocks)[0].shape[2]
    return dataclasses.replace(past, blocks=jax.tree.map(lambda x: pad(x, 2, room), past.blocks))


def append_blocks(
    past: BlockStore,
    x: Float[Array, "B heads T R"],
    start: Starts,
    real: Bool[Array, "B S"],
    codec: Codec = AS_IS,
) -> tuple[BlockStore, Windowed]:
    """The store with T more tokens in each sequence's columns `start`..., and what these T rows read, in x's dtype.

    Args:
        real: which columns hold real tokens, the new ones included.
    """
    rows, columns, block = x.shape[2], real.shape[1], past.recent.shape[2]
    touched = -(-(block - 1 + rows) // block)  # blocks, at most
    first = start // block
    base = first * block
    window = _window(past.recent, x, start - base, touched * block)
    number = jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)
    sinks, whole = past.sinks, 0
    if sinks is not None:
        sinks, whole = _first_tokens(sinks, x, start, number), sinks.shape[2]

    end = jnp.max(jnp.where(real, jnp.arange(1, columns + 1, dtype=jnp.int32), 0), axis=1)  # behind the last token
    numbers = first[..., None] + jnp.arange(touched, dtype=jnp.int32)
    complete = (numbers + 1) * block <= end[:, None]
    held = slice_rows(pad(number >= whole, 1, touched * block), base, touched * block, axis=1)
    encoded = codec.encode(window, first)
    new = codec.quantize(fill(encoded, held, block).astype(jnp.float32), past.blocks)
    place = jnp.where(complete, numbers, columns)  # beyond all blocks: dropped
    write = jax.vmap(lambda old, at, entry: old.at[:, at].set(entry, mode="drop"))
    blocks = jax.tree.map(lambda old, entry: write(old, place, entry), past.blocks, new)
    last = jnp.maximum((end - 1) // block * block - base, 0)
    after = BlockStore(blocks, slice_rows(window, last, block, axis=2), sinks)

    read = codec.decode(read_blocks(blocks)).astype(x.dtype)
    old = pad(read.reshape(*x.shape[:2], -1, x.shape[3]), 2, touched * block)
    if sinks is not None:
        old = with_sinks(old, sinks, number)
    recent = put_rows(old, window.astype(x.dtype), base, axis=2)
    own = (start[..., None] + jnp.arange(rows, dtype=jnp.int32)) // block
    fresh = own[..., None] == jnp.arange(columns, dtype=jnp.int32) // block
    return after, Windowed(old[:, :, :columns], recent[:, :, :columns], fresh.reshape(-1, rows, columns))


def _window(recent: Array, x: Array, used: Array, width: int) -> Array:
    """bfloat16 [B, heads, width, R]: the `used` columns of the block in progress, then the new ones, then zeros."""
    block = recent.shape[2]
    held = jnp.arange(block, dtype=jnp.int32) < used[..., None]
    kept = jnp.where(held.reshape(-1, 1, block, 1), recent, jnp.zeros_like(recent))
    return put_rows(pad(kept, 2, width - block), x.astype(jnp.bfloat16), used, axis=2)


def fill(window: Array, real: Array, block: int) -> Array:
    """The window as blocks [B, heads, N, M, R], masked columns replaced by the largest real entry of the block."""
    blocks = window.reshape(*window.shape[:2], -1, block, window.shape[3])
    mask = real.reshape(real.shape[0], 1, -1, block, 1)
    largest = jnp.max(blocks, axis=-2, keepdims=True, where=mask, initial=-jnp.inf)
    largest = jnp.where(mask.any(axis=-2, keepdims=True), largest, jnp.zeros_like(largest))
    return jnp.where(mask, blocks, largest)


def _first_tokens(sinks: Array, x: Array, start: Array, number: Int32[Array, "B S"]) -> Array:
    """The sinks with those of the new tokens that are among a sequence's first."""
    count = sinks.shape[2]
    new = slice_rows(number, start, x.shape[2], axis=1)
    # In the order of columns there are at most `count` of them, and those come one after another.
    hits = new[:, None] == jnp.arange(count, dtype=jnp.int32)[:, None]  # [B, sinks, T]
    at = jnp.argmax(hits, axis=2)[:, None, :, None]
    chosen = jnp.take_along_axis(x, at, axis=2).astype(jnp.bfloat16)
    return jnp.where(hits.any(axis=2)[:, None, :, None], chosen, sinks)


def with_sinks(old: Array, sinks: Array, number: Int32[Array, "B S"]) -> Array:
    """`old` [B, heads, >= S, R] with the sinks in their columns."""
    hits = number[:, None] == jnp.arange(sinks.shape[2], dtype=jnp.int32)[:, None]  # [B, sinks, S]
    column = jnp.where(hits.any(axis=2), jnp.argmax(hits, axis=2), old.shape[2])  # none: dropped
    write = jax.vmap(lambda each, at, first: each.at[:, at].set(first, mode="drop"))
    return write(old, column, sinks.astype(old.dtype))


def pad(x: Array, axis: int, room: int) -> Array:
    """`room` zeros more behind an axis."""
    return jnp.pad(x, [(0, room if at == axis else 0) for at in range(x.ndim)])
