"""The key-value cache: per layer a tuple of groups, each stored in its own format, each token quantized once.

One rule stands above all: attention reads what the cache stores. `through_storage` gives the uncached forward pass and
training the same damage (with a straight-through gradient) that decoding reads back from `store`d arrays.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from chai_jax.model.membership import calibrated
from chai_jax.model.quantized import Leaf, dequantize, quantize
from chai_jax.spec import Group, LayerSpec, Spec

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 2  # bfloat16, one per (sequence, cached head, token), for int8 only


def store(x: Float[Array, "B heads S R"], storage: str) -> Leaf:
    """Keys or values as the cache holds them: float32, bfloat16, or int8 with a bfloat16 scale per token."""
    if storage == "int8":
        return quantize(x, axes=(-1,))
    return x.astype(jnp.dtype(storage))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def through_storage(x: Float[Array, "B heads S R"], storage: str) -> Float[Array, "B heads S R"]:
    """What attention reads back after `store`, in x's dtype; the gradient passes straight through."""
    return dequantize(store(x, storage), x.dtype)


through_storage.defvjp(lambda x, storage: (through_storage(x, storage), None), lambda storage, _, gradient: (gradient,))


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "membership"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class GroupCache:
    """Stored keys [B, C, S, R] and values [B, value heads, S, R] of one group.

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
    """What decoding needs of the past: `layers[layer][group]`, which columns hold real tokens, how many are used."""

    layers: tuple[tuple[GroupCache, ...], ...]
    mask: Any  # bool [B, S]
    length: Any  # int32 []

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as stored, with scales and memberships (not the mask, 1 byte a token)."""
        return sum(group.nbytes for layer in self.layers for group in layer)

    @property
    def capacity(self) -> int:
        return self.mask.shape[1]


def append(cache: GroupCache, new: GroupCache, start: Int32[Array, ""]) -> GroupCache:
    """Write `new`'s tokens into columns `start`... of `cache`; what was stored before is not touched."""

    def write(old: Array, entry: Array) -> Array:
        # Axis 2 holds the tokens in keys, values and scales alike.
        return jax.lax.dynamic_update_slice_in_dim(old, entry, start, axis=2)

    keys, values = jax.tree.map(write, (cache.keys, cache.values), (new.keys, new.values))
    return GroupCache(keys, values, cache.membership)


def extend(cache: Cache, capacity: int) -> Cache:
    """The same cache with room for `capacity` tokens; new columns are masked out."""
    room = capacity - cache.capacity

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, room if axis == 2 else 0) for axis in range(x.ndim)])

    return Cache(jax.tree.map(pad, cache.layers), jnp.pad(cache.mask, ((0, 0), (0, room))), cache.length)


def group_bytes_per_token(group: Group, layer: LayerSpec) -> int:
    """The formula: C R_k + value heads R_v entries, plus a scale for each cached head where the format is int8."""
    entries = group.clusters * layer.key_rank + group.value_heads * layer.value_rank
    scales = (group.clusters + group.value_heads) * SCALE_BYTES if group.storage == "int8" else 0
    return entries * BYTES[group.storage] + scales


def bytes_per_token(spec: Spec) -> int:
    """Cache bytes of one token of one sequence over all layers, by formula."""
    return sum(group_bytes_per_token(group, layer) for layer in spec.layers for group in layer.groups)


def bytes_per_sequence(spec: Spec) -> int:
    """Cache bytes of one sequence however long: membership per prompt, H + C numbers of 4 bytes in each such layer."""
    return sum(
        4 * (group.assigned + group.clusters) for layer in spec.layers for group in layer.groups if group.assigned
    )


def empty(spec: Spec, batch: int, capacity: int) -> Cache:
    """An empty cache of `capacity` tokens, its memberships the calibrated ones.

    Its `nbytes` is batch * (capacity * `bytes_per_token(spec)` + `bytes_per_sequence(spec)`).
    """

    def group_cache(group: Group, layer: LayerSpec) -> GroupCache:
        keys = jnp.zeros((batch, group.clusters, capacity, layer.key_rank))
        values = jnp.zeros((batch, group.value_heads, capacity, layer.value_rank))
        membership = calibrated(layer.clusters, batch) if group.assigned else None
        return GroupCache(store(keys, group.storage), store(values, group.storage), membership)

    layers = tuple(tuple(group_cache(group, layer) for group in layer.groups) for layer in spec.layers)
    return Cache(layers, jnp.zeros((batch, capacity), bool), jnp.zeros((), jnp.int32))


def measured_bytes_per_token(spec: Spec) -> int:
    """`bytes_per_token` as what one more token adds to the real arrays of an allocated cache, scales included."""
    return empty(spec, batch=1, capacity=2).nbytes - empty(spec, batch=1, capacity=1).nbytes
