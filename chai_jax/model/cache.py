"""The key-value cache: per layer a tuple of groups, each stored in its own format, each token quantized once.

One rule stands above all: attention reads what the cache stores. `through_storage` gives the uncached forward pass and
training the same damage (with a straight-through gradient) that decoding reads back from `store`d arrays.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.basis import KeyCodec, ValueCodec
from chai_jax.model.block_store import (
    AS_IS,
    BlockStore,
    Codec,
    Windowed,
    append_blocks,
    empty_blocks,
    extend_blocks,
    pad,
    read_blocks,
)
from chai_jax.model.by_row import Starts
from chai_jax.model.execution import Execution
from chai_jax.model.kernels.write import put_tokens
from chai_jax.model.membership import calibrated
from chai_jax.model.one_row import OneRow, append_row
from chai_jax.model.params import Params
from chai_jax.model.quantized import Leaf, dequantize, quantize_int8
from chai_jax.plans.channels import Channels
from chai_jax.plans.formats import BLOCKS, Blocks, Side
from chai_jax.plans.spec import Group, LayerSpec, Spec

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 2  # bfloat16; int8 has one per (sequence, cached head, token)


def store(x: Float[Array, "B heads S R"], storage: str) -> Leaf:
    """Keys or values as the cache holds them token by token: float32, bfloat16, or int8 with a bfloat16 scale each."""
    if storage == "int8":
        return quantize_int8(x, axes=(-1,))
    return x.astype(jnp.dtype(storage))


@jax.custom_vjp
def straight_through(x: Float[Array, "*shape"], read: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`read`, what became of x; its gradient is x's."""
    return read


straight_through.defvjp(lambda x, read: (read, None), lambda _, gradient: (gradient, jnp.zeros_like(gradient)))


def through_storage(x: Float[Array, "B heads S R"], storage: str) -> Float[Array, "B heads S R"]:
    """What attention reads back after `store`, in x's dtype; the gradient passes straight through."""
    return straight_through(x, dequantize(store(x, storage), x.dtype))


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "membership"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class GroupCache:
    """Stored keys [B, C, S, R] and values [B, value heads, S, R] of one group: arrays, int8 arrays, or block stores.

    Where every sequence has clusters of its own, they are stored with them: membership of value heads is data then.
    """

    # Any, because tree operations put other things (shapes, shardings) in their places.
    keys: Any
    values: Any
    membership: Any = None  # a Membership

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "mask", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding needs of the past: `layers[layer][group]`, which columns hold tokens, how many a sequence uses."""

    layers: tuple[tuple[GroupCache, ...], ...]
    mask: Any  # bool [B, S]
    length: Any  # int32 [B]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as stored, with scales and memberships (not the mask, 1 byte a token)."""
        return sum(group.nbytes for layer in self.layers for group in layer)

    @property
    def capacity(self) -> int:
        return self.mask.shape[1]


def append(cache: GroupCache, new: GroupCache, start: Int32[Array, "B"], how: Execution | None = None) -> GroupCache:
    """Write each sequence's new tokens into its columns `start`...; what was stored before is not touched.

    Args:
        how: by whose kernels, and how the cache is split over devices; None: XLA, on one.
    """
    write = partial(put_tokens, start=start, how=how)
    keys, values = jax.tree.map(write, (cache.keys, cache.values), (new.keys, new.values))
    return GroupCache(keys, values, cache.membership)


def remember(
    past: GroupCache | None,
    key: Float[Array, "B C T Rk"],
    value: Float[Array, "B heads T Rv"],
    storage: str,
    start: Starts,
    real: Bool[Array, "B S"],
    how: Execution | None = None,
    channels: Channels = (),
    basis: Params | None = None,
) -> tuple[GroupCache, Any, Any]:
    """Store T tokens in columns `start`...: the group's cache after them, and the keys and values that they read.

    Without a past (`start` is 0 then) the gradient passes straight through what is read.

    Args:
        real: which columns hold tokens, these among them.
        how: as of `append`.
        channels, basis: of formats of a basis, the layer's and its parameters; keys are then given, and handed back,
            before their rotation.
    """
    if storage in BLOCKS:
        format, stores = BLOCKS[storage].of(channels), (None, None) if past is None else (past.keys, past.values)
        codec: Codec = AS_IS if basis is None else KeyCodec(basis)
        keys, read_keys = _remember_blocks(stores[0], key, start, real, format, format.keys, codec, how)
        codec = AS_IS if basis is None else ValueCodec(basis, read_blocks(keys.blocks))
        values, read_values = _remember_blocks(stores[1], value, start, real, format, format.values, codec, how)
        return GroupCache(keys, values), read_keys, read_values
    new = GroupCache(store(key, storage), store(value, storage))
    if past is None:
        return new, through_storage(key, storage), through_storage(value, storage)
    new = append(past, new, start, how)
    return new, new.keys, new.values


def _remember_blocks(
    past: BlockStore | None,
    x: Array,
    start: Array,
    real: Array,
    format: Blocks,
    side: Side,
    codec: Codec,
    how: Execution | None,
) -> tuple[BlockStore, Any]:
    batch, heads, rows, rank = x.shape
    if past is None:
        stored, read = append_blocks(empty_blocks(batch, heads, rows, rank, format, side), x, start, real, codec)
        return stored, Windowed(straight_through(x, read.old), straight_through(x, read.recent), read.fresh)
    if rows == 1:
        stored = append_row(past, x, start, real, codec, how)
        row = OneRow(stored, start, real)
        return stored, row if codec is AS_IS else row.expanded(x.dtype, codec)  # kernels know no bases
    return append_blocks(past, x, start, real, codec)


def extend(cache: Cache, capacity: int) -> Cache:
    """The same cache with room for `capacity` tokens; new columns are masked out."""
    room = capacity - cache.capacity

    def leaf(x: Array | BlockStore) -> Array | BlockStore:
        return extend_blocks(x, capacity) if isinstance(x, BlockStore) else pad(x, 2, room)

    layers = jax.tree.map(leaf, cache.layers, is_leaf=lambda x: isinstance(x, BlockStore))
    return Cache(layers, pad(cache.mask, 1, room), cache.length)


def group_bytes_per_token(group: Group, layer: LayerSpec) -> int | float:
    """The formula: C (R_k + values R_v) entries of the format's bytes, and scales.

    int8: one for each cached head. Formats of blocks: `Side.bytes_of_block`, which need not be a whole number a token.
    """
    keys, values = group.clusters, group.value_heads
    format = layer.format_of(group.storage)
    if format is not None:
        block = keys * format.keys.bytes_of_block(format.block, layer.key_rank)
        block += values * format.values.bytes_of_block(format.block, layer.value_rank)
        return _whole(block / format.block)
    entries = keys * layer.key_rank + values * layer.value_rank
    return entries * BYTES[group.storage] + ((keys + values) * SCALE_BYTES if group.storage == "int8" else 0)


def bytes_per_token(spec: Spec) -> int | float:
    """Cache bytes of one more token of one sequence over all layers, by formula."""
    return _whole(sum(group_bytes_per_token(group, layer) for layer in spec.layers for group in layer.groups))


def bytes_per_sequence(spec: Spec) -> int:
    """Cache bytes of one sequence however long, by formula: of formats of blocks, the block in progress and the first
    tokens in bfloat16; of membership per prompt, H + C numbers of 4 bytes in each such layer."""

    def of(group: Group, layer: LayerSpec) -> int:
        entries = group.clusters * layer.key_rank + group.value_heads * layer.value_rank
        format = BLOCKS.get(group.storage)
        window = (format.block + format.sinks) * BYTES["bfloat16"] * entries if format else 0
        return window + (4 * (group.assigned + group.clusters) if group.assigned else 0)

    return sum(of(group, layer) for layer in spec.layers for group in layer.groups)


def cache_bytes(spec: Spec, batch: int, capacity: int) -> int:
    """Cache bytes of `batch` sequences of `capacity` columns, by formula; of blocks only whole ones count."""

    def whole_blocks(group: Group) -> int:
        return capacity // BLOCKS[group.storage].block * BLOCKS[group.storage].block

    columns = sum(
        (whole_blocks(group) if group.storage in BLOCKS else capacity) * group_bytes_per_token(group, layer)
        for layer in spec.layers
        for group in layer.groups
    )
    return batch * (int(columns) + bytes_per_sequence(spec))


def _whole(size: int | float) -> int | float:
    return int(size) if size == int(size) else size


def empty(spec: Spec, batch: int, capacity: int) -> Cache:
    """An empty cache of `capacity` tokens, its memberships the calibrated ones.

    Its `nbytes` is `cache_bytes(spec, batch, capacity)`.
    """

    def leaf(layer: LayerSpec, heads: int, rank: int, storage: str, side: str) -> Leaf | BlockStore:
        format = layer.format_of(storage)
        if format is not None:
            return empty_blocks(batch, heads, capacity, rank, format, getattr(format, side))
        return store(jnp.zeros((batch, heads, capacity, rank)), storage)

    def group_cache(group: Group, layer: LayerSpec) -> GroupCache:
        keys = leaf(layer, group.clusters, layer.key_rank, group.storage, "keys")
        values = leaf(layer, group.value_heads, layer.value_rank, group.storage, "values")
        return GroupCache(keys, values, calibrated(layer.clusters, batch) if group.assigned else None)

    layers = tuple(tuple(group_cache(group, layer) for group in layer.groups) for layer in spec.layers)
    return Cache(layers, jnp.zeros((batch, capacity), bool), jnp.zeros(batch, jnp.int32))


def measured_bytes_per_token(spec: Spec) -> int | float:
    """`bytes_per_token` as summed from the real arrays of allocated caches, scales included: what a block adds to them.

    What a sequence costs however long it is (`bytes_per_sequence`) is not in it.
    """
    block = max(format.block for format in BLOCKS.values())  # which the others divide
    one, two = (empty(spec, batch=1, capacity=capacity).nbytes for capacity in (block, 2 * block))
    return _whole((two - one) / block)
