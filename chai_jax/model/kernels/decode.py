"""Attention of one new token over a stored cache as a Pallas kernel, for TPUs (Mosaic) and NVIDIA GPUs (Triton).

XLA runs a decoding step's attention as several programs with the scores of all columns between them. The kernel reads
each stored key and value once, as it is stored, and keeps everything in between in fast memory: the scores of a block
of columns, the softmax so far (Milakov & Gimelshein 2018, arXiv 1805.02867), and the weighted sums. Long caches are
split over a GPU's programs and merged afterwards (flash-decoding, Dao et al. 2023).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Shaped

from chai_jax.model.kernels import LANES
from chai_jax.model.quantized import Leaf, QuantizedArray

TPU_BLOCK_BYTES = 2**20  # of keys or values; each lies in fast memory twice, the next one arriving
GPU_BLOCK = 64  # columns
GPU_PROGRAMS = 512  # enough for a few on each of a GPU's hundred or so processors
MASKED = float(jnp.finfo(jnp.float32).min)  # finite, as in `scores_of`: a row that may read nothing reads all alike


def decode_attention(
    query: Float[Array, "B C q 1 R"],
    keys: Leaf,
    values: Leaf,
    allowed: Bool[Array, "B 1 S"],
    scale: float,
    value_heads: int,
    platform: str,
    interpret: bool = False,
) -> Float[Array, "B heads 1 Rv"]:
    """What `attend` returns first, for one query row a sequence; keys and values are plain or int8 arrays.

    Args:
        platform: whose kernel, "tpu" or "cuda".
        interpret: run it on the CPU, for tests.
    """
    batch, clusters, queries = query.shape[:3]
    scaled = (query * scale)[:, :, :, 0]
    kernel = {"tpu": _tpu, "cuda": _gpu}[platform]
    mixed = kernel(scaled, keys, values, allowed[:, 0], value_heads, interpret)
    return mixed.reshape(batch, clusters * queries * value_heads, 1, -1).astype(query.dtype)


def _parts(leaf: Any) -> tuple[Array, Array | None]:
    """A stored array and, of int8, its scales [B, heads, S]."""
    return (leaf.values, leaf.scale) if isinstance(leaf, QuantizedArray) else (leaf, None)


def _fold(highest: Array, total: Array, scores: Array) -> tuple[Array, Array, Array, Array]:
    """One block more of a softmax over the last axis: the scores' exponentials, and what the softmax was so far.

    Returns:
        the highest score up to here, the sum of exponentials relative to it, the factor by which sums of the blocks
        before shrink, and this block's exponentials, not yet divided by the sum.
    """
    new = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
    kept, weights = jnp.exp(highest - new), jnp.exp(scores - new)
    return new, total * kept + weights.sum(axis=-1, keepdims=True), kept, weights


def _masked(scores: Array, allowed: Array, inside: Array) -> Array:
    """Columns that may not be read, as in `scores_of`; what lies outside of the cache has no weight at all."""
    return jnp.where(inside, jnp.where(allowed, scores, MASKED), -jnp.inf)


def _tpu(
    query: Float[Array, "B C q R"], keys: Leaf, values: Leaf, allowed: Bool[Array, "B S"], value_heads: int, test: bool
) -> Float[Array, "B values q Rv"]:
    """One sequence after the other, all clusters at once, block after block of columns.

    All clusters at once, because a step of the grid has a cost of its own, and a cluster's block is small; and because
    a block of scales [B, C, S] must have all of C or multiples of 8 of it.
    """
    (stored_keys, key_scale), (stored_values, value_scale) = map(_parts, (keys, values))
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
        partial(_tpu_body, value_heads=value_heads, columns=columns, minor=minor),
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
        interpret=test,
        name="decode_attention",
    )(query, mask, *stored, *scales)


def _as_pinned(x: Shaped[Array, "B heads S R"]) -> tuple[Array, bool]:
    """The array as it lies in a TPU's memory, and whether its tokens come last (see `cache.tokens_minor`)."""
    minor = x.shape[-1] % LANES != 0
    return (jnp.swapaxes(x, 2, 3) if minor else x), minor


def _tpu_body(
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

    def spread(x: Array) -> Array:
        """[C, q, n] -> [C * v, q, n]"""
        return x if value_heads == 1 else jnp.repeat(x, value_heads, axis=0)

    scores = product(query[...], keys[...], 1 if minor[0] else 2)
    if key_scale is not None:
        scores = scores * key_scale[...].astype(jnp.float32)[:, None]
    inside = step * block + jax.lax.broadcasted_iota(jnp.int32, (1, 1, block), 2) < columns
    scores = _masked(scores, mask[...][None] != 0, inside)
    highest[...], total[...], kept, weights = _fold(highest[...], total[...], scores)

    weights, read = spread(weights), values[...]
    if value_scale is not None:
        weights = weights * value_scale[...].astype(jnp.float32)[:, None]
    if columns % block:  # what lies behind the last column may be anything, and 0 * nan is nan
        weights = jnp.where(inside, weights, 0.0)
        at = step * block + jax.lax.broadcasted_iota(jnp.int32, read.shape, 2 if minor[1] else 1)
        read = jnp.where(at < columns, read, jnp.zeros_like(read))
    mixed = product(weights.astype(query.dtype), read, 2 if minor[1] else 1)
    sums[...] = sums[...] * spread(kept) + mixed

    @pl.when(step == pl.num_programs(1) - 1)
    def _finish() -> None:
        output[...] = (sums[...] / spread(total[...])).astype(output.dtype)


def _gpu(
    query: Float[Array, "B C q R"], keys: Leaf, values: Leaf, allowed: Bool[Array, "B S"], value_heads: int, test: bool
) -> Float[Array, "B C v q Rv"]:
    """A program for each cluster of each sequence, and for each of the parts that its columns are split into.

    Every part leaves sums relative to its own highest score; merging them here costs little.
    """
    (stored_keys, key_scale), (stored_values, value_scale) = map(_parts, (keys, values))
    batch, clusters, queries, rank = query.shape
    columns, value_rank = stored_values.shape[2:]
    blocks = pl.cdiv(columns, GPU_BLOCK)
    span = pl.cdiv(blocks, min(blocks, max(1, GPU_PROGRAMS // (batch * clusters)))) * GPU_BLOCK
    parts = pl.cdiv(columns, span)
    # Triton wants powers of 2, and its matrix products at least 16 rows: rows of zeros, which nothing reads.
    rows = 1 if queries == 1 else max(16, pl.next_power_of_2(queries))
    query = jnp.pad(query, ((0, 0), (0, 0), (0, rows - queries), (0, pl.next_power_of_2(rank) - rank)))

    def part(*shape: int) -> pl.BlockSpec:
        """A cluster's columns of one part: of its keys, values, or scales."""
        return pl.BlockSpec((None, *shape), lambda b, c, s: (b, c, s, 0)[: 1 + len(shape)])

    def result(*shape: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        whole = jax.ShapeDtypeStruct((batch, clusters, parts, *shape), jnp.float32)
        return pl.BlockSpec((None, None, None, *shape), lambda b, c, s: (b, c, s, *[0] * len(shape))), whole

    results = result(rows, 1), result(rows, 1), result(value_heads, rows, pl.next_power_of_2(value_rank))
    scales = [x for x in (key_scale, value_scale) if x is not None]
    highest, total, sums = pl.pallas_call(
        partial(_gpu_body, columns=columns, ranks=(rank, value_rank)),
        grid=(batch, clusters, parts),
        in_specs=[
            pl.BlockSpec((None, None, *query.shape[2:]), lambda b, c, s: (b, c, 0, 0)),
            pl.BlockSpec((None, span), lambda b, c, s: (b, s)),
            part(1, span, pl.next_power_of_2(rank)),
            part(value_heads, span, pl.next_power_of_2(value_rank)),
            *([part(1, span), part(value_heads, span)] if scales else []),
        ],
        out_specs=[spec for spec, _ in results],
        out_shape=[shape for _, shape in results],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=test,
        name="decode_attention",
    )(query, allowed.astype(jnp.int8), stored_keys, stored_values, *scales)
    shrunk = jnp.exp(highest - highest.max(axis=2, keepdims=True))
    merged = (sums * shrunk[:, :, :, None]).sum(axis=2) / (total * shrunk).sum(axis=2)[:, :, None]
    return merged[:, :, :, :queries, :value_rank]


def _gpu_body(query: Any, mask: Any, keys: Any, values: Any, *rest: Any, columns: int, ranks: tuple[int, int]) -> None:
    """References of one part: query [rows, R], mask [span], keys [1, span, R], values [v, span, Rv], int8's scales
    [1, span] and [v, span]; outputs: highest score and sum of exponentials [rows, 1], sums [v, rows, Rv]. R and Rv
    are rounded up to powers of 2."""
    *scales, highest_out, total_out, sums_out = rest
    key_scale, value_scale = scales or (None, None)
    first = pl.program_id(2) * mask.shape[0]
    row = query[...]

    def product(x: Array, y: Array) -> Array:
        """x [rows, m] times y [m, n], float32; of one row, which Triton's matrix product cannot take, by hand."""
        if x.shape[0] > 1:
            return plgpu.dot(x, y)
        return jnp.sum(x[0][:, None].astype(jnp.float32) * y.astype(jnp.float32), axis=0)[None]

    def load(ref: Any, head: int, at: Any, inside: Array, rank: int) -> Array:
        """A block [GPU_BLOCK, R] of a head; zeros outside of the array."""
        real = inside[:, None] & (jnp.arange(ref.shape[-1]) < rank)[None]
        return plgpu.load(ref.at[jnp.int32(head), at, :], mask=real, other=0).astype(row.dtype)

    def row_of(scales: Any, head: int, at: Any, inside: Array) -> Array:
        """A head's scales [1, GPU_BLOCK]."""
        return plgpu.load(scales.at[jnp.int32(head), at], mask=inside, other=0).astype(jnp.float32)[None]

    def step(index: Array, so_far: Any) -> Any:
        highest, total, sums = so_far
        at = pl.ds(index * GPU_BLOCK, GPU_BLOCK)
        inside = first + index * GPU_BLOCK + jnp.arange(GPU_BLOCK) < columns
        scores = product(row, load(keys, 0, at, inside, ranks[0]).T)
        if key_scale is not None:
            scores = scores * row_of(key_scale, 0, at, inside)
        allowed = plgpu.load(mask.at[at], mask=inside, other=0) != 0
        highest, total, kept, weights = _fold(highest, total, _masked(scores, allowed[None], inside[None]))
        mixed = []
        for head, before in enumerate(sums):
            own = weights
            if value_scale is not None:
                own = own * row_of(value_scale, head, at, inside)
            read = load(values, head, at, inside, ranks[1])
            mixed.append(before * kept + product(own.astype(row.dtype), read))
        return highest, total, tuple(mixed)

    rows = row.shape[0]
    nothing = tuple(jnp.zeros((rows, values.shape[-1]), jnp.float32) for _ in range(values.shape[0]))
    empty = jnp.full((rows, 1), MASKED, jnp.float32), jnp.zeros((rows, 1), jnp.float32), nothing
    highest_out[...], total_out[...], sums = jax.lax.fori_loop(0, mask.shape[0] // GPU_BLOCK, step, empty)
    for head, each in enumerate(sums):
        sums_out[head] = each
