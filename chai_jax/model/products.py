"""Matrix products accumulated in float32, and value heads laid out for them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from chai_jax.model import kernels
from chai_jax.model.kernels import products_cpu


def product(equation: str, one: Array, two: Array, row: str) -> Float[Array, "..."]:
    """`jnp.einsum(equation, one, two)` of arrays of one dtype, float32. A weight may be int8.

    Args:
        row: the letter of the rows, in the operand that is no weight and nothing stored.
    """

    def plain(one: Array, two: Array) -> Array:
        one, two = (x if x.dtype != jnp.int8 else x.astype(y.dtype) for x, y in ((one, two), (two, one)))
        return jnp.einsum(equation, one, two, preferred_element_type=jnp.float32)

    on_cpu = _on_cpu(equation, (one, two), row, plain)
    return plain(one, two) if on_cpu is None else jax.lax.platform_dependent(one, two, cpu=on_cpu, default=plain)


def _on_cpu(
    equation: str, operands: tuple[Array, Array], row: str, plain: Callable[..., Array]
) -> Callable[..., Array] | None:
    """How CPUs multiply these, if not as all do: a few rows and a matrix by a kernel, where there are kernels.

    Elsewhere XLA takes five to seven times as long for one row of bfloat16 as for two, which take the CPU's
    instructions for bfloat16 where there are any: there a single row is multiplied twice.
    """
    terms, result = equation.split("->")
    names = terms.split(",")
    at = next(place for place, letters in enumerate(names) if row in letters)
    mine, other, dtype = names[at], names[1 - at], operands[1 - at].dtype.name
    free = "".join(letter for letter in mine if letter not in other)
    shared = "".join(letter for letter in other if letter in mine)
    own = "".join(letter for letter in other if letter not in mine)
    size = dict(zip(mine + other, operands[at].shape + operands[1 - at].shape, strict=True))
    rows, summed, columns = (math.prod(size[letter] for letter in letters) for letters in (free, shared, own))
    turned = other == own + shared
    matrix = not set(shared) & set(result) and (turned or other == shared + own)
    if kernels.on_cpu() and matrix and products_cpu.takes(rows, summed, columns, dtype, turned):

        def by_kernel(*operands: Array) -> Array:
            x = jnp.einsum(f"{mine}->{free}{shared}", operands[at]).reshape(rows, summed)
            weights = operands[1 - at].reshape((columns, summed) if turned else (summed, columns))
            found = products_cpu.times(x, weights, turned).reshape([size[letter] for letter in free + own])
            return jnp.einsum(f"{free}{own}->{result}", found)

        return by_kernel

    def doubled(*operands: Array) -> Array:
        pair = list(operands)
        pair[at] = jnp.repeat(pair[at], 2, axis=mine.index(row))
        return jax.lax.slice_in_dim(plain(*pair), 0, 1, axis=result.index(row))

    return doubled if rows == 1 and operands[at].dtype == jnp.bfloat16 else None


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
