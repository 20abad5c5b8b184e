"""Attention of one new token on an NVIDIA GPU (Triton): a program for each cluster of each sequence.

Long caches are split over several programs and merged afterwards (flash-decoding, Dao et al. 2023). Columns that no
token of the sequence uses, before and behind, are not read.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.kernels.columns import MASKED, masked, stored_parts
from chai_jax.model.quantized import Leaf

# On an H100, opt-1.3b's heads, 64 sequences of 2,048 columns: of 14 choices of sums, warps and programs the fastest for
# int8; for bfloat16 less than 2 % slower than its fastest.
GPU_SUMS = 4096  # float32 of a program's sums so far, or twice that with `GPU_LEAST` columns; half as many for int8
GPU_LEAST = 16  # columns at once
GPU_WARPS = 4
GPU_PROGRAMS = 512  # a few for each of a GPU's hundred or so processors


def takes(query: Float[Array, "B C q 1 R"], keys: Leaf, values: Leaf, value_heads: int) -> bool:
    """Whether the kernel of GPUs is for such clusters; XLA computes the others about as fast.

    A cluster must have one query head, and so few and short values that a program's sums stay in registers (8 heads of
    64 entries, 4 of 128). An array of 2^31 entries or more must be larger than 4 GiB: Pallas chooses int64 for its
    indices by the bytes, and would count the entries of a smaller one with int32.
    """
    widest = pl.next_power_of_2(max(query.shape[-1], values.shape[-1]))
    small = GPU_LEAST * widest * pl.next_power_of_2(value_heads) <= 2 * GPU_SUMS
    stored = (stored_parts(leaf)[0] for leaf in (keys, values))
    return query.shape[2] == 1 and small and all(x.size < 2**31 or x.nbytes > 2**32 for x in stored)


def attend_on_gpu(
    query: Float[Array, "B C 1 R"],
    keys: Leaf,
    values: Leaf,
    allowed: Bool[Array, "B S"],
    value_heads: int,
    interpret: bool,
) -> Float[Array, "B C v Rv"]:
    """A program for each cluster of each sequence, and for each of the parts that its columns are split into.

    Every part leaves sums relative to its own highest score, which are merged here.
    """
    (stored_keys, key_scale), (stored_values, value_scale) = map(stored_parts, (keys, values))
    batch, clusters, _, rank = query.shape
    columns, value_rank = stored_values.shape[2:]
    wide, value_wide = map(pl.next_power_of_2, (rank, value_rank))  # Triton wants powers of 2
    most = GPU_SUMS // (2 if key_scale is not None else 1)
    block = max(GPU_LEAST, most // (max(wide, value_wide) * pl.next_power_of_2(value_heads)))
    blocks = pl.cdiv(columns, block)
    span = pl.cdiv(blocks, min(blocks, max(1, GPU_PROGRAMS // (batch * clusters)))) * block
    parts = pl.cdiv(columns, span)
    scales = [x for x in (key_scale, value_scale) if x is not None]

    def part(*shape: int) -> pl.BlockSpec:
        """A cluster's columns of one part: of its keys, values, or scales."""
        return pl.BlockSpec((None, *shape), lambda b, c, s: (b, c, s, 0)[: 1 + len(shape)])

    def result(dtype: Any, *shape: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        whole = jax.ShapeDtypeStruct((batch, clusters, parts, *shape), dtype)
        return pl.BlockSpec((None, None, None, *shape), lambda b, c, s: (b, c, s, *[0] * len(shape))), whole

    results = [result(query.dtype if parts == 1 else jnp.float32, value_heads, value_wide)]
    results += [result(jnp.float32)] * (2 if parts > 1 else 0)
    sums, *softmax = pl.pallas_call(
        partial(
            _body, block=block, columns=columns, ranks=(rank, value_rank), scaled=bool(scales), interpret=interpret
        ),
        grid=(batch, clusters, parts),
        in_specs=[
            pl.BlockSpec((None, 2), lambda b, c, s: (b, 0)),
            pl.BlockSpec((None, span), lambda b, c, s: (b, s)),
            pl.BlockSpec((None, None, wide), lambda b, c, s: (b, c, 0)),
            part(1, span, wide),
            part(value_heads, span, value_wide),
            *([part(1, span), part(value_heads, span)] if scales else []),
        ],
        out_specs=[spec for spec, _ in results],
        out_shape=[shape for _, shape in results],
        compiler_params=plgpu.CompilerParams(num_warps=GPU_WARPS, num_stages=1),
        interpret=interpret,
        name="decode_attention",
    )(
        _used(allowed),
        allowed.astype(jnp.int8),
        jnp.pad(query[:, :, 0], [(0, 0), (0, 0), (0, wide - rank)]),
        *(stored_keys, stored_values, *scales),
    )
    sums = sums[..., :value_rank]
    if not softmax:
        return sums[:, :, 0]
    highest, total = (x[..., None, None] for x in softmax)
    shrunk = jnp.exp(highest - highest.max(axis=2, keepdims=True))
    return (sums * shrunk).sum(axis=2) / (total * shrunk).sum(axis=2)


def _used(allowed: Bool[Array, "B S"]) -> Int32[Array, "B 2"]:
    """The first column that a sequence may read, and the one behind the last; of one that may read nothing, all."""
    columns = allowed.shape[1]
    first, behind = jnp.argmax(allowed, axis=1), columns - jnp.argmax(allowed[:, ::-1], axis=1)
    none = ~allowed.any(axis=1)
    return jnp.stack([jnp.where(none, 0, first), jnp.where(none, columns, behind)], axis=1).astype(jnp.int32)


def _body(
    used: Any, mask: Any, query: Any, keys: Any, values: Any, *rest: Any,
    block: int, columns: int, ranks: tuple[int, int], scaled: bool, interpret: bool,
) -> None:  # fmt: skip
    """References of one part: used [2], mask [span], query [R], keys [1, span, R], values [v, span, Rv], if `scaled`
    int8's scales [1, span] and [v, span]; outputs: sums [v, Rv], and of several parts the highest score and the sum of
    exponentials that they are relative to. R and Rv are rounded up to powers of 2.

    Each of the `block` columns that are read at once goes on with a softmax and sums of its own, step after step, so
    that threads wait for each other at the end alone; and while they compute, the next block is on its way.
    """
    key_scale, value_scale = rest[:2] if scaled else (None, None)
    sums_out, *softmax_out = rest[2 * scaled :]
    first, heads = pl.program_id(2) * mask.shape[0], range(values.shape[0])
    begin = jnp.minimum(jnp.maximum(used[0] - first, 0), mask.shape[0]) // block
    end = (jnp.minimum(jnp.maximum(used[1] - first, 0), mask.shape[0]) + block - 1) // block
    row = query[...].astype(jnp.float32)[None]

    def read(index: Array) -> tuple[Array, list[Array], list[Array]]:
        """A block as it is stored: its mask (-1 outside of the cache), keys and values [block, R], scales [block]."""
        at = pl.ds(index * block, block)
        inside = (first + index * block + jnp.arange(block) < columns) & (index < end)

        def of_head(ref: Any, head: int, rank: int) -> Array:
            real = (jnp.arange(ref.shape[-1]) < rank)[None] & inside[:, None]
            return plgpu.load(ref.at[jnp.int32(head), at, :], mask=real, other=0)

        def of_columns(ref: Any, *head: int, other: int = 0) -> Array:
            return plgpu.load(ref.at[(*map(jnp.int32, head), at)], mask=inside, other=other)

        stored = [of_head(keys, 0, ranks[0]), *(of_head(values, head, ranks[1]) for head in heads)]
        scales = [of_columns(key_scale, 0), *(of_columns(value_scale, head) for head in heads)] if scaled else []
        return of_columns(mask, other=-1), stored, scales

    def step(index: Array, carried: Any) -> Any:
        highest, total, sums, (allowed, stored, scales) = carried
        ahead = read(index + 1)
        (key, *value), by = ([_float32(x, interpret) for x in some] for some in (stored, scales))
        scores = jnp.sum(key * row, axis=1)
        scores = masked(scores * by[0] if scaled else scores, allowed > 0, allowed >= 0)
        new = jnp.maximum(highest, scores)
        kept, weights = jnp.exp(highest - new), jnp.exp(scores - new)
        own = [weights * by[1 + head] if scaled else weights for head in heads]
        mixed = [_fma(sums[head], kept[:, None], own[head][:, None] * value[head], interpret) for head in heads]
        return new, total * kept + weights, mixed, ahead

    lowest, nothing = jnp.full((block,), MASKED, jnp.float32), jnp.zeros((block,), jnp.float32)
    empty = [jnp.zeros((block, values.shape[-1]), jnp.float32) for _ in heads]
    highest, total, sums, _ = jax.lax.fori_loop(begin, end, step, (lowest, nothing, empty, read(begin)))
    top = jnp.max(highest)
    shrunk = jnp.exp(highest - top)
    whole = jnp.sum(total * shrunk)
    if softmax_out:
        softmax_out[0][...], softmax_out[1][...] = top, whole
    for head in heads:
        mixed = jnp.sum(sums[head] * shrunk[:, None], axis=0)
        sums_out[head] = (mixed if softmax_out else mixed / whole).astype(sums_out.dtype)


def _float32(x: Array, interpret: bool) -> Array:
    """In float32. Of int8 the byte of x + 128 behind the exponent of 2^23 reads 2^23 + 128 + x.

    Triton's own conversion takes four bytes apart one by one and uses one of the slowest instructions. What is
    interpreted knows no assembly: this and `_fma` are tested on GPUs alone (tests/conftest.py).
    """
    if x.dtype != jnp.int8 or interpret:
        return x.astype(jnp.float32)
    code = "{.reg .b32 u; xor.b32 u, $4, 0x80808080;"
    code += " ".join(f"prmt.b32 ${byte}, u, 0x4B000000, 0x744{byte};" for byte in range(4)) + "}"
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (bits,) = plgpu.elementwise_inline_asm(
        code, args=[x], constraints="=r,=r,=r,=r,r", pack=4, result_shape_dtypes=[shape]
    )
    return bits - (2.0**23 + 128)


def _fma(x: Array, y: Array, z: Array, interpret: bool) -> Array:
    """x * y + z in one instruction, which neither XLA nor Triton makes of two."""
    y = jnp.broadcast_to(y, x.shape)
    if interpret:
        return x * y + z
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    code, constraints = "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f"
    return plgpu.elementwise_inline_asm(
        code, args=[x, y, z], constraints=constraints, pack=1, result_shape_dtypes=[shape]
    )[0]
