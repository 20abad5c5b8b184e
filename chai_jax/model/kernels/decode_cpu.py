"""Attention of one new token on a CPU (decode_cpu.cc): a task for each cluster of each sequence.

Columns that no token of the sequence uses, before and behind, are not read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from chai_jax.model.kernels.columns import stored_parts
from chai_jax.model.quantized import Leaf


def attend_on_cpu(
    query: Float[Array, "B C q R"],
    keys: Leaf,
    values: Leaf,
    allowed: Bool[Array, "B S"],
    value_heads: int,
) -> Float[Array, "B C vq Rv"]:
    """Outputs in float32, a cluster's value by value and of each its queries; the query is already scaled.

    Keys and values are of one type: float32, bfloat16 or int8."""
    (stored_keys, key_scale), (stored_values, value_scale) = map(stored_parts, (keys, values))
    batch, clusters, queries, _ = query.shape
    shape = batch, clusters, value_heads * queries, stored_values.shape[-1]
    call = jax.ffi.ffi_call("chai_jax_attention", jax.ShapeDtypeStruct(shape, jnp.float32))
    scales = [x for x in (key_scale, value_scale) if x is not None]
    out: Array = call(query.astype(jnp.float32), stored_keys, stored_values, allowed, *scales)
    return out
