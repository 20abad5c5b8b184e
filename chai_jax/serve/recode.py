"""A sequence's cache in another format: what was stored is read, and stored again."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.block_store import BlockStore
from chai_jax.model.cache import Cache, GroupCache, remember
from chai_jax.model.few_bits import turned
from chai_jax.model.one_row import OneRow
from chai_jax.model.quantized import Leaf, dequantize
from chai_jax.plans.spec import Spec
from chai_jax.serve.slots import Slots


@partial(jax.jit, static_argnames=("before", "after"))
def recoded(one: Slots, *, before: Spec, after: Spec) -> Slots:
    """A single sequence, whose cache was made by the spec `before`, with the cache of the spec `after`.

    The two differ in storages alone. A format of fewer bits rounds what is read once more; one of more bits keeps the
    damage that was done.
    """
    cache = one.cache
    layers = []
    for old, new, groups in zip(before.layers, after.layers, cache.layers, strict=True):
        layers.append(
            tuple(
                _group(stored, was.storage, becomes.storage, cache.length, cache.mask)
                for was, becomes, stored in zip(old.groups, new.groups, groups, strict=True)
            )
        )
    return dataclasses.replace(one, cache=Cache(tuple(layers), cache.mask, cache.length))


def _group(
    stored: GroupCache, was: str, becomes: str, length: Int32[Array, "1"], real: Bool[Array, "1 S"]
) -> GroupCache:
    if was == becomes:
        return stored
    keys, values = (_read(each, length, real) for each in (stored.keys, stored.values))
    values = turned(turned(values, was), becomes)
    new, _, _ = remember(None, keys, values, becomes, jnp.zeros((), jnp.int32), real)
    return dataclasses.replace(new, membership=stored.membership)


def _read(
    stored: Leaf | BlockStore, length: Int32[Array, "1"], real: Bool[Array, "1 S"]
) -> Float[Array, "1 heads S R"]:
    if isinstance(stored, BlockStore):
        return OneRow(stored, jnp.maximum(length - 1, 0), real).expanded(jnp.float32)
    return dequantize(stored, jnp.float32)
