"""Attention in prefill on an NVIDIA GPU: cuDNN's flash attention, which JAX offers.

As on TPUs (`prefill_tpu`) scores stay in fast memory (Dao et al. 2022, arXiv 2205.14135). cuDNN takes sequences of
different lengths with their padding on the right, so real tokens are moved to the left, and their outputs back.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SHORTEST = 256  # columns from which on it pays
LARGEST_RANK = 128  # entries of a head, on every GPU from Ampere on

_cudnn = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def takes(
    query: Float[Array, "B C q T R"], keys: Float[Array, "B C T R"], values: Float[Array, "B values T Rv"]
) -> bool:
    """Whether cuDNN is there and computes this: two bytes an entry, and heads of keys and values of one size."""
    rank, dtype = query.shape[-1], query.dtype
    of_one_kind = keys.dtype == values.dtype == dtype and keys.shape[-1] == values.shape[-1] == rank
    small = rank <= LARGEST_RANK and rank % 8 == 0 and dtype in (jnp.bfloat16, jnp.float16)
    return of_one_kind and small and query.shape[3] >= SHORTEST and _available()


@cache
def _available() -> bool:
    """Whether JAX finds a cuDNN, which comes with jax[cuda]; no GPU is needed to lower programs with it."""
    heads = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(_cudnn, heads, heads, heads)
    except RuntimeError:
        return False
    return True


def prefill_on_gpu(
    query: Float[Array, "B C q T R"],
    keys: Float[Array, "B C T R"],
    values: Float[Array, "B values T R"],
    allowed: Bool[Array, "B T T"],
    scale: float,
    value_heads: int,
) -> Float[Array, "B heads T R"]:
    """What `attend_in_order` returns first, where a row may read every real column up to its own, and no other.

    Rows of padding, which nothing reads, hold something finite. It wants as many keys as values: where a cluster has
    several value heads, its keys and queries are repeated, and its softmax is computed for each.
    """
    batch, _, _, length, rank = query.shape
    query = jnp.repeat(query, value_heads, axis=1).reshape(batch, -1, length, rank)
    keys = jnp.repeat(keys, value_heads, axis=1)
    real = allowed[:, -1]  # the last row may read every real column
    order = jnp.argsort(~real, axis=1, stable=True)
    number = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    lengths = number[:, -1] + 1
    columns_first = (_rows(jnp.swapaxes(x, 1, 2), order) for x in (query, keys, values))
    mixed = _cudnn(*columns_first, scale=scale, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return jnp.swapaxes(_rows(mixed, number), 1, 2)


def _rows(x: Float[Array, "B T N R"], order: Array) -> Float[Array, "B T N R"]:
    """Each sequence's rows in another order."""
    return jax.vmap(lambda rows, at: rows.at[at].get(mode="promise_in_bounds"))(x, order)
