"""Attention in prefill on a TPU: JAX's splash attention, given clusters for its heads.

XLA writes the scores of all pairs of a block of rows to HBM and reads them back for the softmax: 4 bytes a pair and
head several times over, which at a few hundred columns is more than all else that a layer moves. Flash attention (Dao
et al. 2022, arXiv 2205.14135) keeps them in fast memory, and blocks of columns behind a block of rows are skipped.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float

from chai_jax.model.kernels import LANES
from chai_jax.model.wide_heads import apart, side_by_side

SHORTEST = 256  # columns from which on it pays: for fewer, by estimate, a kernel would mostly start blocks
LARGEST_BLOCK = 896  # rows and columns, whose scores fit fast memory: 3 MB
LARGEST_STEP = 512  # columns of a block that are computed at once


def takes(query: Float[Array, "B C q T R"]) -> bool:
    """Whether there are enough tokens."""
    return query.shape[3] >= SHORTEST


def prefill_on_tpu(
    query: Float[Array, "B C q T R"],
    keys: Float[Array, "B C T R"],
    values: Float[Array, "B values T Rv"],
    allowed: Bool[Array, "B T T"],
    scale: float,
    value_heads: int,
    interpret: bool = False,
) -> Float[Array, "B heads T Rv"]:
    """What `attend_in_order` returns first, where a row may read every real column up to its own, and no other.

    Rows of padding, which nothing reads, read padding. A cluster's value heads are one wide value: its softmax is
    computed once.

    Args:
        interpret: run it on the CPU, for tests.
    """
    batch, clusters, queries, length, _ = query.shape
    columns = -(-length // LANES) * LANES
    heads = (query * scale).reshape(batch, clusters * queries, length, -1)
    wide = side_by_side(values, value_heads)
    real = allowed[:, -1].astype(jnp.int32)  # the last row may read every real column
    ends = [(0, 0), (0, 0), (0, columns - length), (0, 0)]
    heads, keys, wide = (jnp.pad(x, ends) for x in (heads, keys, wide))
    segments = splash.SegmentIds(*[jnp.pad(real, ends[1:3])] * 2)
    mask = splash.MultiHeadMask([splash.CausalMask((columns, columns))] * heads.shape[1])
    run = splash.make_splash_mha(mask, block_sizes=_blocks(columns), head_shards=1, q_seq_shards=1, interpret=interpret)
    with jax.numpy_dtype_promotion("standard"):  # the library's own
        mixed = jax.vmap(run)(heads, keys, wide, segments)[:, :, :length]
    by_cluster = mixed.reshape(batch, clusters, queries * length, -1)
    return apart(by_cluster, value_heads).reshape(batch, -1, length, values.shape[-1])


def _blocks(columns: int) -> splash.BlockSizes:
    """Square blocks, the largest that divide the columns; keys and values with tokens minor, as a TPU's cache is."""
    block = _divisor(columns, LARGEST_BLOCK)
    minor = splash.QKVLayout.SEQ_MINOR
    return splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=_divisor(block, LARGEST_STEP), k_layout=minor, v_layout=minor
    )


def _divisor(columns: int, most: int) -> int:
    """The largest multiple of `LANES` up to `most` that divides `columns`."""
    return next(size for size in range(most // LANES * LANES, 0, -LANES) if columns % size == 0)
