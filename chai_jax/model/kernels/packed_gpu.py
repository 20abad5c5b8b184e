"""Attention of one new token to blocks of few bits on an NVIDIA GPU (Triton): block after block, as it is stored.

A program is for a cluster of a sequence, and for a part of its blocks where these are many. Of each block it makes the
keys [R, M] and the values [M, R] in registers, with its columns in their order: an entry's byte is loaded by each of
the entries that it holds, which after the first finds it in the cache. All queries of a cluster are rows of one
product.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.few_bits import FewBits
from chai_jax.model.kernels.columns import MASKED, masked
from chai_jax.model.kernels.packed import NOT_HERE, READ, Part, kind, level_of, merged, scale_of, states, whole_part
from chai_jax.model.one_row import OneRow
from chai_jax.plans.formats import GRID

SUMS = 8192  # float32 of a program's sums so far
WIDEST = 256  # channels of a head, rounded up
LEAST = 16  # rows and columns of a product on tensor cores
WARPS = 4
PROGRAMS = 512  # a few for each of a GPU's hundred or so processors


UNTRIED = "CHAI_JAX_GPU_BLOCKS"  # 1: use the kernel, which has run on no GPU yet; otherwise XLA attends


def takes(query: Float[Array, "B C q 1 R"], keys: Any, values: Any, value_heads: int) -> bool:
    """Whether the kernel is for such blocks and clusters: sums must stay in registers, which 8 value heads of 64
    entries do, or 4 of 128, for up to 16 queries. For the sizes of arrays see `decode_gpu.takes`."""
    if os.environ.get(UNTRIED) != "1" or not kind(keys, values):
        return False
    rows, widths = _rounded(query.shape[2]), [_rounded(store.recent.shape[-1]) for store in (keys.store, values.store)]
    stored = jax.tree.leaves((keys.store.blocks, values.store.blocks))
    small = max(widths) <= WIDEST and value_heads * rows * widths[1] <= SUMS
    return small and all(x.size < 2**31 or x.nbytes > 2**32 for x in stored)


def _rounded(size: int) -> int:
    return max(LEAST, pl.next_power_of_2(size))


def attend_to_blocks(
    query: Float[Array, "B C q R"],
    keys: OneRow,
    values: OneRow,
    allowed: Bool[Array, "B S"],
    value_heads: int,
    interpret: bool,
) -> Float[Array, "B values q Rv"]:
    """Every part of the blocks leaves sums relative to its own highest score; for what is in none see `packed`."""
    state = states(keys, allowed)
    batch, _, queries, rank = query.shape
    value_rank = values.store.recent.shape[-1]
    rows, wide, value_wide = map(_rounded, (queries, rank, value_rank))
    asked = jnp.pad(query, [(0, 0), (0, 0), (0, rows - queries), (0, wide - rank)])
    sizes = value_heads, rows, value_wide
    highest, total, sums = _call(asked, keys, values, state, _used(state, allowed), sizes, interpret)

    def of_part(at: int) -> Part:
        mixed = sums[:, :, at, :, :queries, :value_rank].reshape(batch, -1, queries, value_rank)
        return Part(highest[:, :, at, :queries, None], total[:, :, at, :queries, None], mixed)

    parts = [of_part(at) for at in range(highest.shape[2])]
    return merged([*parts, whole_part(query, keys, values, allowed, value_heads)], value_heads)


def _call(
    query: Array, keys: OneRow, values: OneRow, state: Array, used: Array, sizes: tuple[int, int, int], interpret: bool
) -> list[Array]:
    """The highest score and the sum of exponentials [B, C, parts, q], sums [B, C, parts, v, q, Rv]; `sizes` are v, q
    and Rv, the latter rounded up."""
    batch, clusters, rows, wide = query.shape
    _, count, block = state.shape
    span = pl.cdiv(count, min(count, max(1, PROGRAMS // (batch * clusters))))
    parts = pl.cdiv(count, span)
    key, value = keys.store.blocks, values.store.blocks
    rank, value_rank = (each.store.recent.shape[-1] for each in (keys, values))
    read: tuple[ReadKey, ReadValue] = partial(_int4_key, rank=rank), partial(_int4_value, rank=value_rank)
    if isinstance(key, FewBits):
        read = (
            partial(_few_key, bits=key.planes.shape[3], rank=rank),
            partial(_few_value, bits=value.planes.shape[3], rank=value_rank),
        )
    stored = [[x.reshape(*x.shape[:2], -1) for x in jax.tree.leaves(leaf)] for leaf in (key, value)]

    def of_heads(x: Array, heads: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, heads, x.shape[2]), lambda b, c, s: (b, c, 0))

    def result(*shape: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        whole = jax.ShapeDtypeStruct((batch, clusters, parts, *shape), jnp.float32)
        return pl.BlockSpec((None, None, None, *shape), lambda b, c, s: (b, c, s, *[0] * len(shape))), whole

    results = [result(rows), result(rows), result(*sizes)]
    out: list[Array] = pl.pallas_call(
        partial(_body, read=read, many=len(stored[0]), span=span, count=count, block=block),
        grid=(batch, clusters, parts),
        in_specs=[
            pl.BlockSpec((None, 2), lambda b, c, s: (b, 0)),
            pl.BlockSpec((None, count * block), lambda b, c, s: (b, 0)),
            pl.BlockSpec((None, None, rows, wide), lambda b, c, s: (b, c, 0, 0)),
            *(of_heads(x, heads) for some, heads in zip(stored, (1, sizes[0]), strict=True) for x in some),
        ],
        out_specs=[spec for spec, _ in results],
        out_shape=[shape for _, shape in results],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="decode_attention_blocks",
    )(used, state.reshape(batch, -1).astype(jnp.int8), query, *stored[0], *stored[1])
    return out


def _used(state: Int32[Array, "B N M"], allowed: Bool[Array, "B S"]) -> Int32[Array, "B 2"]:
    """The first block that a sequence reads, and the one behind the last; all, if it may read nothing anywhere."""
    read = (state == READ).any(axis=2)
    count = read.shape[1]
    first, behind = jnp.argmax(read, axis=1), count - jnp.argmax(read[:, ::-1], axis=1)
    most = jnp.where(allowed.any(axis=1), 0, count)
    some = read.any(axis=1)
    return jnp.stack([jnp.where(some, first, 0), jnp.where(some, behind, most)], axis=1).astype(jnp.int32)


ReadKey = Callable[[list[Any], Array, int], Array]
ReadValue = Callable[[list[Any], Array, Array, int], tuple[Array, Array]]


def _body(
    used: Any, state: Any, query: Any, *rest: Any,
    read: tuple[ReadKey, ReadValue], many: int, span: int, count: int, block: int,
) -> None:  # fmt: skip
    """References of one part: used [2], states [N * M], query [q, R], of keys and values what is stored, each [heads,
    entries]; outputs: the highest score and the sum of exponentials [q], sums [v, q, Rv]. q, R and Rv are rounded up.
    """
    *stored, highest_out, total_out, sums_out = rest
    keys, values = stored[:many], stored[many:]
    heads, rows, wide = range(sums_out.shape[0]), query.shape[0], sums_out.shape[2]
    first = pl.program_id(2) * span
    begin, end = jnp.maximum(first, used[0]), jnp.minimum(jnp.minimum(first + span, count), used[1])
    asked = query[...]

    def step(at: Array, carried: Any) -> Any:
        highest, total, sums = carried
        key = read[0](keys, at, query.shape[1])
        scores = jnp.dot(asked, key.astype(asked.dtype), preferred_element_type=jnp.float32)
        of = plgpu.load(state.at[pl.ds(at * block, block)]).astype(jnp.int32)[None]
        scores = masked(scores, of == READ, of != NOT_HERE)
        new = jnp.maximum(highest, jnp.max(scores, axis=1))
        kept, weights = jnp.exp(highest - new), jnp.exp(scores - new[:, None])
        mixed = []
        for head in heads:
            by, value = read[1](values, jnp.int32(head), at, wide)
            own = (weights * by[None]).astype(asked.dtype)
            one = jnp.dot(own, value.astype(asked.dtype), preferred_element_type=jnp.float32)
            mixed.append(sums[head] * kept[:, None] + one)
        return new, total * kept + jnp.sum(weights, axis=1), mixed

    start = jnp.full((rows,), MASKED, jnp.float32), jnp.zeros((rows,), jnp.float32)
    empty = [jnp.zeros((rows, wide), jnp.float32) for _ in heads]
    highest, total, sums = jax.lax.fori_loop(begin, end, step, (*start, empty))
    highest_out[...], total_out[...] = highest, total
    for head in heads:
        sums_out[head] = sums[head]


def _loaded(ref: Any, head: Any, at: Array, real: Array) -> Array:
    """Bytes as int32, the rest as float32; zero where it is not `real`."""
    shape = jnp.broadcast_shapes(at.shape, real.shape)
    at, real = jnp.broadcast_to(at, shape), jnp.broadcast_to(real, shape)
    x = plgpu.load(ref.at[head, at], mask=real, other=0)
    return x.astype(jnp.int32 if x.dtype == jnp.uint8 else jnp.float32)


def _numbers(byte: Callable[[Any, Any], Array], column: Array, bits: int) -> Array:
    """The numbers of a block's columns (0 to 63) as `few_bits._pack` packs them.

    Args:
        byte: that of a plane in which each column lies, where the second argument says so.
    """
    quarter, up = column >> 4, (column >> 3 & 1) * 4
    if bits == 4:
        return byte(quarter, True) >> up & 15
    if bits == 2:
        return byte(quarter >> 1, True) >> up + 2 * (quarter & 1) & 3
    own = byte(jnp.minimum(quarter, 2), quarter < 3) >> up & 7
    last = [(byte(jnp.full_like(quarter, plane), quarter == 3) >> up + 3 & 1) << plane for plane in range(3)]
    return own | last[0] | last[1] | last[2]


def _few_key(stored: list[Any], at: Array, wide: int, *, bits: int, rank: int) -> Array:
    """The keys [R, 64] of block `at`."""
    planes, scale, low = stored
    channel, column = jnp.arange(wide, dtype=jnp.int32), jnp.arange(64, dtype=jnp.int32)[None]
    real, head = channel < rank, jnp.int32(0)

    def byte(plane: Array, where: Any) -> Array:
        inside = ((at * bits + plane) * rank + channel[:, None]) * 8 + (column & 7)
        return _loaded(planes, head, inside, real[:, None] & where)

    steps, lowest = (_loaded(x, head, at * rank + channel, real) for x in (scale, low))
    return _numbers(byte, column, bits).astype(jnp.float32) * scale_of(steps)[:, None] + lowest[:, None]


def _few_value(stored: list[Any], head: Array, at: Array, wide: int, *, bits: int, rank: int) -> tuple[Array, Array]:
    """The scales [64] of block `at`, which multiply weights, and the levels [64, R]."""
    planes, scale = stored
    channel, column = jnp.arange(wide, dtype=jnp.int32)[None], jnp.arange(64, dtype=jnp.int32)
    across, width = column[:, None], -(-rank // 8) * 8

    def byte(plane: Array, where: Any) -> Array:
        return _loaded(
            planes, head, ((at * bits + plane) * 8 + (across & 7)) * width + channel, (channel < rank) & where
        )

    return _loaded(scale, head, at * 64 + column, column < 64), level_of(_numbers(byte, across, bits), bits)


def _int4_key(stored: list[Any], at: Array, wide: int, *, rank: int) -> Array:
    """The keys [R, 32] of block `at`."""
    packed, scale, low = stored
    channel, column = jnp.arange(wide, dtype=jnp.int32), jnp.arange(GRID, dtype=jnp.int32)[None]
    real, head = channel < rank, jnp.int32(0)
    both = _loaded(packed, head, (at * (GRID // 2) + (column >> 1)) * rank + channel[:, None], real[:, None])
    steps, lowest = (_loaded(x, head, at * rank + channel, real) for x in (scale, low))
    return (both >> (column & 1) * 4 & 15).astype(jnp.float32) * steps[:, None] + lowest[:, None]


def _int4_value(stored: list[Any], head: Array, at: Array, wide: int, *, rank: int) -> tuple[Array, Array]:
    """Ones [32], and the values [32, R] of block `at`."""
    packed, scale, low = stored
    channel, column = jnp.arange(wide, dtype=jnp.int32)[None], jnp.arange(GRID, dtype=jnp.int32)[:, None]
    real, row = channel < rank, at * GRID + column
    both = _loaded(packed, head, row * -(-rank // 2) + (channel >> 1), real)
    group = row * -(-rank // GRID) + channel // GRID
    steps, lowest = (_loaded(x, head, group, real) for x in (scale, low))
    values = (both >> (channel & 1) * 4 & 15).astype(jnp.float32) * steps + lowest
    return jnp.ones((GRID,), jnp.float32), values
