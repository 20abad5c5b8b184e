"""Attention of one new token over a stored cache as a kernel, for TPUs, NVIDIA GPUs and CPUs.

XLA runs a decoding step's attention as several programs with the scores of all columns between them. The kernel reads
each stored key and value once, as it is stored, and keeps everything in between in fast memory: the scores of a block
of columns, the softmax so far (Milakov & Gimelshein 2018, arXiv 1805.02867), and the weighted sums.
"""

from functools import partial
from typing import Any

from jaxtyping import Array, Bool, Float

from chai_jax.model.kernels import packed_gpu, packed_tpu
from chai_jax.model.kernels.decode_cpu import attend_on_cpu
from chai_jax.model.kernels.decode_gpu import attend_on_gpu
from chai_jax.model.kernels.decode_tpu import attend_on_tpu
from chai_jax.model.one_row import OneRow
from chai_jax.model.quantized import Leaf


def decode_attention(
    query: Float[Array, "B C q 1 R"],
    keys: Leaf | OneRow,
    values: Leaf | OneRow,
    allowed: Bool[Array, "B 1 S"],
    scale: float,
    value_heads: int,
    platform: str,
    interpret: bool = False,
) -> Float[Array, "B heads 1 Rv"]:
    """What `attend` returns first, for one query row a sequence; keys and values are plain or int8 arrays, or stores of
    blocks.

    Args:
        platform: whose kernel, "tpu", "cuda" or "cpu"; of "cuda" see `decode_gpu.takes`.
        interpret: run those of accelerators on the CPU, for tests.
    """
    batch, clusters, queries = query.shape[:3]
    scaled = (query * scale)[:, :, :, 0]
    pallas: dict[str, Any] = {"tpu": attend_on_tpu, "cuda": attend_on_gpu}
    if isinstance(keys, OneRow):
        pallas = {"tpu": packed_tpu.attend_to_blocks, "cuda": packed_gpu.attend_to_blocks}
    kernel = partial(pallas[platform], interpret=interpret) if platform in pallas else attend_on_cpu
    mixed = kernel(scaled, keys, values, allowed[:, 0], value_heads)
    return mixed.reshape(batch, clusters * value_heads * queries, 1, -1).astype(query.dtype)
