"""Attention of clusters: one function for dense, qk, qkv and kv layers.

A group is C clusters. Each caches one key head that `q` query heads read and `v` value heads (one of q, v is 1), so
each cluster computes its attention matrix once and hands q * v heads to the output projection.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from chai_jax.model.block_store import Windowed
from chai_jax.model.kernels import decode_cpu, decode_gpu, packed, packed_gpu, prefill_gpu, prefill_tpu
from chai_jax.model.kernels.decode import decode_attention
from chai_jax.model.one_row import OneRow
from chai_jax.model.products import product
from chai_jax.model.quantized import Leaf, QuantizedArray, dequantize
from chai_jax.model.wide_heads import apart, side_by_side

ROWS = 512  # of a long sequence whose attention is computed at once


def scores_of(
    query: Float[Array, "B C q T R"], keys: Leaf | Windowed | OneRow, allowed: Bool[Array, "B T S"], scale: float
) -> Float[Array, "B C q T S"]:
    """Scaled pre-softmax scores in float32; pairs that are not allowed hold the lowest finite float32.

    An int8 key's scale multiplies its score, so that the stored array goes into the dot as it is.
    """
    if isinstance(keys, OneRow):
        keys = keys.expanded(query.dtype)
    if isinstance(keys, Windowed):
        old, recent = (scores_of(query, part, allowed, scale) for part in (keys.old, keys.recent))
        return jnp.where(keys.fresh[:, None, None], recent, old)
    stored = _multiplied(keys, query.dtype)
    # All rows of a cluster in one axis: with two of them XLA copies the keys to another layout on CPUs.
    rows = (query * scale).reshape(*query.shape[:2], -1, query.shape[-1])
    scores = product("bcmk,bcsk->bcms", rows.astype(stored.dtype), stored, row="m")
    scores = scores.reshape(*query.shape[:-1], -1)
    if isinstance(keys, QuantizedArray):
        scores = scores * keys.scale.astype(jnp.float32)[:, :, None, None, :]
    return jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)


def mix_values(
    probabilities: Float[Array, "B C q T S"], values: Leaf | Windowed | OneRow, value_heads: int, dtype: DTypeLike
) -> Float[Array, "B heads T R"]:
    """Weighted sums of the values [B, C * v, S, R] under each cluster's attention: C * v * q heads, of each cluster
    its values, of each value its queries.

    With one query row (decoding) every value head gets a copy of its cluster's probabilities, which an int8 value's
    scale multiplies. With many rows the values are read back instead, and a cluster's value heads are one wide value.
    """
    if isinstance(values, OneRow):
        values = values.expanded(dtype)
    if isinstance(values, Windowed):
        recent = jnp.where(values.fresh[:, None, None], probabilities, 0.0)
        old = mix_values(probabilities - recent, values.old, value_heads, dtype)
        return old + mix_values(recent, values.recent, value_heads, dtype)
    batch, clusters, queries, rows, columns = probabilities.shape
    probabilities = probabilities.reshape(batch, clusters, queries * rows, columns)
    if rows > 1:
        read = side_by_side(dequantize(values, dtype), value_heads)
        mixed = apart(product("bcms,bcsn->bcmn", probabilities.astype(dtype), read, row="m"), value_heads)
    else:
        copies = jnp.broadcast_to(probabilities[:, :, None], (batch, clusters, value_heads, queries, columns))
        probabilities = copies.reshape(batch, clusters * value_heads, queries, columns)
        if isinstance(values, QuantizedArray):
            probabilities = probabilities * values.scale.astype(jnp.float32)[:, :, None]
        read = _multiplied(values, dtype)
        mixed = product("bhms,bhsr->bhmr", probabilities.astype(read.dtype), read, row="m")
    return mixed.astype(dtype).reshape(batch, clusters * queries * value_heads, rows, -1)


def _multiplied(stored: Leaf, dtype: DTypeLike) -> Array:
    """Keys or values as they are multiplied: in `dtype`, but what is stored in float32 is not copied to another."""
    if isinstance(stored, QuantizedArray):
        return stored.values.astype(dtype)
    wide = isinstance(stored, jax.Array) and stored.dtype == jnp.float32
    return dequantize(stored, jnp.float32 if wide else dtype)


def attend(
    query: Float[Array, "B C q T R"],
    keys: Leaf | Windowed | OneRow,
    values: Leaf | Windowed | OneRow,
    allowed: Bool[Array, "B T S"],
    scale: float,
    value_heads: int,
) -> tuple[Float[Array, "B heads T Rv"], Float[Array, "B C q T S"], Float[Array, "B C q T S"]]:
    """Outputs of the group's heads (ordered as `mix_values` says), with the scores and probabilities they came from.

    Args:
        query: one group's query heads.
        keys: stored [B, C, S, R], plain, quantized, or in two precisions.
        values: stored [B, C * value_heads, S, R], likewise.
        allowed: which columns a row may read (causal, and no padding).
        scale: 1 / sqrt(head dimension of the dense model).
        value_heads: cached value heads of each cluster.
    """
    scores = scores_of(query, keys, allowed, scale)
    probabilities = jax.nn.softmax(scores, axis=-1)
    return mix_values(probabilities, values, value_heads, query.dtype), scores, probabilities


def attend_in_order(
    query: Float[Array, "B C q T R"],
    keys: Array | Windowed,
    values: Array | Windowed,
    allowed: Bool[Array, "B T T"],
    scale: float,
    value_heads: int,
) -> tuple[Float[Array, "B heads T Rv"], Float[Array, "B C q T T"], Float[Array, "B C q T T"]]:
    """`attend` where the rows are the columns and none reads a later one: `ROWS` rows at a time, without what is later.

    Of 2,048 columns three eighths of the pairs are never computed, and a quarter of all is held at once.
    """
    length, blocks = allowed.shape[1], []
    for first in range(0, length, ROWS):
        end = min(first + ROWS, length)
        rows = slice(first, end)
        key, value = (part.upto(rows) if isinstance(part, Windowed) else part[:, :, :end] for part in (keys, values))
        out, *seen = attend(query[:, :, :, rows], key, value, allowed[:, rows, :end], scale, value_heads)
        later = [(0, 0)] * 4 + [(0, length - end)]
        fills = jnp.finfo(jnp.float32).min, 0.0
        blocks.append((out, *(jnp.pad(x, later, constant_values=y) for x, y in zip(seen, fills, strict=True))))
    heads, scores, probabilities = zip(*blocks, strict=True)
    return jnp.concatenate(heads, 2), jnp.concatenate(scores, 3), jnp.concatenate(probabilities, 3)


def attend_one(
    query: Float[Array, "B C q 1 R"],
    keys: Leaf | OneRow,
    values: Leaf | OneRow,
    allowed: Bool[Array, "B 1 S"],
    scale: float,
    value_heads: int,
    kernels: str,
) -> Float[Array, "B heads 1 Rv"]:
    """What `attend` returns first, for one row, by the kernel of the device that the program is compiled for.

    Keys and values are plain or int8 arrays, or stores of blocks. It is `attend` where there is no kernel: on GPUs for
    what `decode_gpu.takes` or `packed_gpu.takes` refuses, for blocks of other formats than `packed.kind` knows, and on
    devices that the `kernels` are not for.

    Args:
        kernels: "native" or "pallas". The caller has seen that the devices can have them, one and not too old
            (`chai_jax.model.kernels.check`), which cannot be seen from here.
    """
    rest: dict[str, Any] = {"scale": scale, "value_heads": value_heads}
    if kernels == "native":
        platforms = ["cpu"] if decode_cpu.takes(keys, values) else []
    elif isinstance(keys, OneRow) or isinstance(values, OneRow):
        takes = {"tpu": packed.kind(keys, values), "cuda": packed_gpu.takes(query, keys, values, value_heads)}
        platforms = [platform for platform, taken in takes.items() if taken]
    else:
        platforms = ["tpu", *(["cuda"] if decode_gpu.takes(query, keys, values, value_heads) else [])]
    lowered = {platform: partial(decode_attention, **rest, platform=platform) for platform in platforms}
    default = partial(_heads, attend, **rest)
    return jax.lax.platform_dependent(query, keys, values, allowed, default=default, **lowered)


def attend_prefill(
    query: Float[Array, "B C q T R"],
    keys: Array,
    values: Array,
    allowed: Bool[Array, "B T T"],
    scale: float,
    value_heads: int,
) -> Float[Array, "B heads T Rv"]:
    """What `attend_in_order` returns first, by the Pallas kernel of the device that the program is compiled for.

    It is `attend_in_order` where there is no kernel for so many tokens, or for such heads (`prefill_tpu.takes`,
    `prefill_gpu.takes`). Rows of a kernel may read every real column up to their own: `allowed` has no branches.
    """
    rest: dict[str, Any] = {"scale": scale, "value_heads": value_heads}
    lowered = {}
    if prefill_tpu.takes(query):
        lowered["tpu"] = partial(prefill_tpu.prefill_on_tpu, **rest)
    if prefill_gpu.takes(query, keys, values):
        lowered["cuda"] = partial(prefill_gpu.prefill_on_gpu, **rest)
    default = partial(_heads, attend_in_order, **rest)
    return jax.lax.platform_dependent(query, keys, values, allowed, default=default, **lowered)


def _heads(attention: Callable[..., tuple[Array, Array, Array]], *stored: Any, **rest: Any) -> Array:
    """Outputs alone, of which scores and probabilities are no part."""
    return attention(*stored, **rest)[0]
