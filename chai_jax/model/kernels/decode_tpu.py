"""Attention of one new token on a TPU (Mosaic): one sequence after the other, block after block of its columns."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Shaped

from chai_jax.model.kernels import LANES
from chai_jax.model.kernels.columns import MASKED, masked, stored_parts
from chai_jax.model.quantized import Leaf

TPU_BLOCK_BYTES = 2**20  # of keys or values; each lies in fast memory twice, the next one arriving


def attend_on_tpu(
    query: Float[Array, "B C q R"],
    keys: Leaf,
    values: Leaf,
    allowed: Bool[Array, "B S"],
    value_heads: int,
    interpret: bool,
) -> Float[Array, "B values q Rv"]:
    """One sequence after the other, all clusters at once, block after block of columns.

    All clusters at once, because a step of the grid has a cost of its own, and a cluster's block is small; and because
    a block of scales [B, C, S] must have all of C or multiples of 8 of it.
    """
    (stored_keys, key_scale), (stored_values, value_scale) = map(stored_parts, (keys, values))
    batch, clusters, queries, _ = query.shape
    heads, columns, rank = stored_values.shape[1:]
    stored, minor = zip(*(_as_pinned(x) for x in (stored_keys, stored_values)), strict=True)
    largest = max(x.nbytes // (batch * columns) for x in stored)
    block = min(columns, max(1, TPU_BLOCK_BYTES // largest // LANES) * LANES)

    def along(x: Array, axis: int) -> pl.BlockSpec:
        """Blocks of one sequence, cut along an axis."""
        shape = (None, *(block if i == axis else size for i, size in enumerate(x.shape) if i))
        return pl.BlockSpec(shape, lambda b, s: (b, *(s if i == axis else 0 for i in range(1, x.ndim))))

    # Not bool, whose blocks cannot be cut; one row a sequence, since blocks have all rows or multiples of 8.
    mask = allowed.astype(jnp.int32)[:, None]
    scales = [x for x in (key_scale, value_scale) if x is not None]
    shape = heads, queries, rank
    return pl.pallas_call(
        partial(_body, value_heads=value_heads, columns=columns, minor=minor),
        grid=(batch, pl.cdiv(columns, block)),
        in_specs=[
            pl.BlockSpec((None, *query.shape[1:]), lambda b, s: (b, 0, 0, 0)),
            along(mask, 2),
            *(along(x, 3 if last else 2) for x, last in zip(stored, minor, strict=True)),
            *(along(x, 2) for x in scales),
        ],
        out_specs=pl.BlockSpec((None, *shape), lambda b, s: (b, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, *shape), query.dtype),
        scratch_shapes=[
            pltpu.VMEM((clusters, queries, 1), jnp.float32),
            pltpu.VMEM((clusters, queries, 1), jnp.float32),
            pltpu.VMEM(shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(query, mask, *stored, *scales)


def _as_pinned(x: Shaped[Array, "B heads S R"]) -> tuple[Array, bool]:
    """The array as it lies in a TPU's memory, and whether its tokens come last (see `write.tokens_minor`)."""
    minor = x.shape[-1] % LANES != 0
    return (jnp.swapaxes(x, 2, 3) if minor else x), minor


def _body(
    query: Any, mask: Any, keys: Any, values: Any, *rest: Any, value_heads: int, columns: int, minor: Any
) -> None:
    """References: query [C, q, R], mask [1, block], keys and values [heads, R, block] (or [heads, block, R] if not
    `minor`), int8's scales [heads, block]; output [C * v, q, Rv]; the softmax so far [C, q, 1] twice, sums [C * v, q,
    Rv]."""
    *scales, output, highest, total, sums = rest
    key_scale, value_scale = scales or (None, None)
    step, block = pl.program_id(1), mask.shape[-1]

    @pl.when(step == 0)
    def _start() -> None:
        highest[...] = jnp.full(highest.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def product(x: Array, stored: Array, contracted: int) -> Array:
        """Batched over heads: x [heads, q, n] times what is stored, in x's dtype; float32."""
        dimensions = (((2,), (contracted,)), ((0,), (0,)))
        return jax.lax.dot_general(x, stored.astype(x.dtype), dimensions, preferred_element_type=jnp.float32)

    def for_values(x: Array) -> Array:
        """[C, q, n] -> [C * v, q, n]"""
        return x if value_heads == 1 else jnp.repeat(x, value_heads, axis=0)

    scores = product(query[...], keys[...], 1 if minor[0] else 2)
    if key_scale is not None:
        scores = scores * key_scale[...].astype(jnp.float32)[:, None]
    inside = step * block + jax.lax.broadcasted_iota(jnp.int32, (1, 1, block), 2) < columns
    scores = masked(scores, mask[...][None] != 0, inside)
    highest[...], total[...], kept, weights = _fold(highest[...], total[...], scores)

    weights, read = for_values(weights), values[...]
    if value_scale is not None:
        weights = weights * value_scale[...].astype(jnp.float32)[:, None]
    if columns % block:  # what lies behind the last column may be anything, and 0 * nan is nan
        weights = jnp.where(inside, weights, 0.0)
        at = step * block + jax.lax.broadcasted_iota(jnp.int32, read.shape, 2 if minor[1] else 1)
        read = jnp.where(at < columns, read, jnp.zeros_like(read))
    mixed = product(weights.astype(query.dtype), read, 2 if minor[1] else 1)
    sums[...] = sums[...] * for_values(kept) + mixed

    @pl.when(step == pl.num_programs(1) - 1)
    def _finish() -> None:
        output[...] = (sums[...] / for_values(total[...])).astype(output.dtype)


def _fold(highest: Array, total: Array, scores: Array) -> tuple[Array, Array, Array, Array]:
    """One block more of a softmax over the last axis: the scores' exponentials, and what the softmax was so far.

    Returns:
        the highest score up to here, the sum of exponentials relative to it, the factor by which sums of the blocks
        before shrink, and this block's exponentials, not yet divided by the sum.
    """
    new = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
    kept, weights = jnp.exp(highest - new), jnp.exp(scores - new)
    return new, total * kept + weights.sum(axis=-1, keepdims=True), kept, weights
