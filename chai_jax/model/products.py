"""Matrix products accumulated in float32, and value heads laid out for them."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(equation: str, one: Array, two: Array, row: str) -> Float[Array, "..."]:
    """`jnp.einsum(equation, one, two)` of arrays of one dtype, float32.

    XLA for CPUs takes five to seven times as long for one row of bfloat16 as for two, which take its matrix unit (AMX)
    or its instructions for bfloat16 where there are any: there a single row is multiplied twice.

    Args:
        row: the letter of the rows, in the operand that is no weight and nothing stored.
    """
    plain = partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    terms, result = equation.split("->")
    names = terms.split(",")
    at = next(place for place, letters in enumerate(names) if row in letters)
    shape = dict(zip(names[at], (one, two)[at].shape, strict=True))
    rows = math.prod(size for letter, size in shape.items() if letter not in names[1 - at])
    if rows > 1 or one.dtype != jnp.bfloat16:
        return plain(one, two)

    def doubled(*operands: Array) -> Array:
        pair = list(operands)
        pair[at] = jnp.repeat(pair[at], 2, axis=names[at].index(row))
        return jax.lax.slice_in_dim(plain(*pair), 0, 1, axis=result.index(row))

    return jax.lax.platform_dependent(one, two, cpu=doubled, default=plain)


def side_by_side(values: Float[Array, "B values S R"], count: int) -> Float[Array, "B C S cR"]:
    """Each `count` neighbouring heads as one wide head: attention that they share is one matmul."""
    batch, heads, columns, rank = values.shape
    grouped = jnp.swapaxes(values.reshape(batch, heads // count, count, columns, rank), 2, 3)
    return grouped.reshape(batch, heads // count, columns, count * rank)


def apart(mixed: Float[Array, "B C T cR"], count: int) -> Float[Array, "B heads T R"]:
    """Each wide head as its `count` heads: what `side_by_side` joined."""
    batch, clusters, rows, width = mixed.shape
    grouped = jnp.swapaxes(mixed.reshape(batch, clusters, rows, count, width // count), 2, 3)
    return grouped.reshape(batch, clusters * count, rows, width // count)
