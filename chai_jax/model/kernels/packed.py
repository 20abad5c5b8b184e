"""What accelerators' kernels over blocks of few bits have in common.

A kernel attends to whole blocks and leaves a part of the softmax: its highest score, the sum of exponentials, the
weighted values. XLA attends to the few tokens that are bfloat16, a sequence's first ones and its block in progress,
which is another part; `merged` makes one softmax of all.
"""

from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.block_store import pad
from chai_jax.model.by_row import slice_rows
from chai_jax.model.few_bits import FewBits, all_levels
from chai_jax.model.kernels.columns import masked
from chai_jax.model.one_row import OneRow, numbered
from chai_jax.model.quantized import Int4Array, Leaf
from chai_jax.plans.formats import GRID

NOT_HERE, HIDDEN, READ = -1, 0, 1  # a column of another part, one that may not be read, one that is


class Part(NamedTuple):
    """Attention to some of the columns; weighted values and the sum are relative to the highest score."""

    highest: Float[Array, "B C q 1"]
    total: Float[Array, "B C q 1"]
    sums: Float[Array, "B values q Rv"]


def kind(keys: Leaf | OneRow, values: Leaf | OneRow) -> str:
    """Of which formats' blocks keys and values are, "few" (`kNvM`) or "int4"; empty if of none that kernels know."""
    if not isinstance(keys, OneRow) or not isinstance(values, OneRow):
        return ""
    stores, blocks = (keys.store, values.store), (keys.store.blocks, values.store.blocks)
    columns = {store.recent.shape[2] for store in stores}
    if len(columns) > 1 or jax.tree.leaves(blocks[0])[0].shape[2] == 0:
        return ""
    if all(isinstance(each, FewBits) for each in blocks):
        return "few" if [each.side.scales for each in blocks] == ["channel", "token"] else ""
    if not all(isinstance(each, Int4Array) for each in blocks):
        return ""
    usual = [each.axis for each in blocks] == [-2, -1] and {each.group for each in blocks} == columns == {GRID}
    return "int4" if usual else ""


def states(row: OneRow, allowed: Bool[Array, "B S"]) -> Int32[Array, "B blocks M"]:
    """What becomes of each column of the blocks: NOT_HERE, HIDDEN or READ."""
    store, columns = row.store, allowed.shape[1]
    block, count = store.recent.shape[2], jax.tree.leaves(store.blocks)[0].shape[2]
    number = numbered(row.real)
    first = (number >= 0) & (number < (0 if store.sinks is None else store.sinks.shape[2]))
    elsewhere = first | (jnp.arange(columns, dtype=jnp.int32) // block == row.start[:, None] // block)
    state = jnp.where(elsewhere, NOT_HERE, jnp.where(allowed, READ, HIDDEN)).astype(jnp.int32)
    return state[:, : count * block].reshape(-1, count, block)


def whole_part(
    query: Float[Array, "B C q R"], keys: OneRow, values: OneRow, allowed: Bool[Array, "B S"], value_heads: int
) -> Part:
    """The columns that are bfloat16: the block in progress, and the first tokens that are not in it."""
    store, columns = keys.store, allowed.shape[1]
    block = store.recent.shape[2]
    base = keys.start // block * block
    at = base[:, None] + jnp.arange(block, dtype=jnp.int32)
    readable = slice_rows(pad(allowed, 1, block), base, block, axis=1)
    state = jnp.where(at < columns, jnp.where(readable, READ, HIDDEN), NOT_HERE)
    key, value = store.recent, values.store.recent
    if store.sinks is not None:
        key, value = (jnp.concatenate([each.store.sinks, each.store.recent], axis=2) for each in (keys, values))
        state = jnp.concatenate([_states_of_first(keys, allowed), state], axis=1)
    product = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("bcqr,bcsr->bcqs", query, key.astype(query.dtype), **product)
    state = state[:, None, None]
    scores = masked(scores, state == READ, state != NOT_HERE)
    highest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    each = jnp.repeat(weights, value_heads, axis=1).astype(query.dtype)
    sums = jnp.einsum("bhqs,bhsr->bhqr", each, value.astype(query.dtype), **product)
    return Part(highest, weights.sum(axis=-1, keepdims=True), sums)


def _states_of_first(row: OneRow, allowed: Bool[Array, "B S"]) -> Int32[Array, "B sinks"]:
    block, count = row.store.recent.shape[2], row.store.sinks.shape[2]
    hits = numbered(row.real)[:, None] == jnp.arange(count, dtype=jnp.int32)[:, None]  # [B, sinks, S]
    column = jnp.argmax(hits, axis=2).astype(jnp.int32)
    here = hits.any(axis=2) & (column // block != row.start[:, None] // block)
    state = jnp.where(jnp.take_along_axis(allowed, column, axis=1), READ, HIDDEN)
    return jnp.where(here, state, NOT_HERE)


def merged(parts: list[Part], value_heads: int) -> Float[Array, "B values q Rv"]:
    """The outputs of one softmax over the columns of all parts."""
    top = reduce(jnp.maximum, (part.highest for part in parts))
    shrunk = [jnp.exp(part.highest - top) for part in parts]
    total = sum(part.total * by for part, by in zip(parts, shrunk, strict=True))
    sums = sum(part.sums * jnp.repeat(by, value_heads, axis=1) for part, by in zip(parts, shrunk, strict=True))
    return jnp.asarray(sums / jnp.repeat(jnp.asarray(total), value_heads, axis=1))


def scale_of(code: Int32[Array, "..."]) -> Float[Array, "..."]:
    """`few_bits.SCALES`, computed rather than looked up."""
    return jnp.exp2((code.astype(jnp.float32) - 160) * (1 / 12))


def level_of(number: Int32[Array, "..."], bits: int) -> Float[Array, "..."]:
    """The level of each number of so many bits: a tree of choices among the positive ones, then the sign."""
    half = 1 << bits - 1
    negative = number < half
    size = jnp.where(negative, half - 1 - number, number - half)
    found: list[Any] = [np.float32(level) for level in all_levels(bits)[half:]]
    for bit in range(bits - 1):
        chosen = size & 1 << bit != 0
        found = [jnp.where(chosen, *pair) for pair in zip(found[1::2], found[::2], strict=True)]
    return jnp.where(negative, -found[0], found[0])
