"""Attention of one new token on a CPU (decode_cpu.cc, decode_blocks.cc): a task for each cluster of each sequence.

Columns that no token of the sequence uses, before and behind, are not read; of blocks, none that have only such.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from chai_jax.model.few_bits import SCALES, FewBits, all_levels
from chai_jax.model.kernels.columns import stored_parts
from chai_jax.model.one_row import OneRow
from chai_jax.model.quantized import Leaf

FEW_BLOCK, INT4_BLOCK = 64, 32  # columns of the blocks that decode_blocks.cc is compiled for


def takes(keys: Leaf | OneRow, values: Leaf | OneRow) -> bool:
    """Whether there is a kernel for keys and values that are stored so."""
    if not isinstance(keys, OneRow) or not isinstance(values, OneRow):
        return not isinstance(keys, OneRow) and not isinstance(values, OneRow)
    blocks = keys.store.blocks, values.store.blocks
    size = {keys.store.recent.shape[2], values.store.recent.shape[2]}
    if all(isinstance(each, FewBits) for each in blocks):
        return [each.side.scales for each in blocks] == ["channel", "token"] and size == {FEW_BLOCK}
    if any(isinstance(each, FewBits) for each in blocks):
        return False
    return [each.axis for each in blocks] == [-2, -1] and size == {INT4_BLOCK} == {each.group for each in blocks}


def attend_on_cpu(
    query: Float[Array, "B C q R"],
    keys: Leaf | OneRow,
    values: Leaf | OneRow,
    allowed: Bool[Array, "B S"],
    value_heads: int,
) -> Float[Array, "B C vq Rv"]:
    """Outputs in float32, a cluster's value by value and of each its queries; the query is already scaled.

    Keys and values are of one type: float32, bfloat16, int8, or of blocks."""
    query = query.astype(jnp.float32)
    if isinstance(keys, OneRow) and isinstance(values, OneRow):
        return _over_blocks(query, keys, values, allowed, value_heads)
    (stored_keys, key_scale), (stored_values, value_scale) = map(stored_parts, (keys, values))
    batch, clusters, queries, _ = query.shape
    shape = batch, clusters, value_heads * queries, stored_values.shape[-1]
    call = jax.ffi.ffi_call("chai_jax_attention", jax.ShapeDtypeStruct(shape, jnp.float32))
    scales = [x for x in (key_scale, value_scale) if x is not None]
    out: Array = call(query, stored_keys, stored_values, allowed, *scales)
    return out


def _over_blocks(query: Array, keys: OneRow, values: OneRow, allowed: Array, value_heads: int) -> Array:
    stores = keys.store, values.store
    batch, clusters, queries, _ = query.shape
    shape = batch, clusters, value_heads * queries, values.store.recent.shape[-1]
    # A format without first tokens has none of them.
    first = [store.recent[:, :, :0] if store.sinks is None else store.sinks for store in stores]
    common = query, allowed, keys.real, keys.start, *(store.recent for store in stores), *first
    key, value = (store.blocks for store in stores)
    if isinstance(key, FewBits):
        name, levels = "chai_jax_attention_few_bits", np.asarray(all_levels(value.side.bits), np.float32)
        parts = [key.planes, key.scale, key.low, value.planes, value.scale, SCALES, levels]
    else:
        name = "chai_jax_attention_int4"
        parts = [part for blocks in (key, value) for part in (blocks.packed, blocks.scale, blocks.low)]
    out: Array = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32))(*common, *parts)
    return out
