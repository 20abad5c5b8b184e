"""Matrix products accumulated in float32."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from chai_jax.model.kernels import products_cpu


def product(equation: str, one: Array, two: Array, row: str, kernels: str = "xla") -> Float[Array, "..."]:
    """`jnp.einsum(equation, one, two)` of arrays of one dtype, float32. A weight may be int8.

    Args:
        row: the letter that counts rows. It is in the operand that is computed, not in the one that is stored (a
            weight, or what a cache holds).
        kernels: with "native", CPUs multiply a few rows by a matrix with a kernel (`chai_jax.model.execution`).
    """

    def plain(one: Array, two: Array) -> Array:
        one, two = (x if x.dtype != jnp.int8 else x.astype(y.dtype) for x, y in ((one, two), (two, one)))
        return jnp.einsum(equation, one, two, preferred_element_type=jnp.float32)

    on_cpu = _on_cpu(equation, (one, two), row, kernels, plain)
    return plain(one, two) if on_cpu is None else jax.lax.platform_dependent(one, two, cpu=on_cpu, default=plain)


def _on_cpu(
    equation: str, operands: tuple[Array, Array], row: str, kernels: str, plain: Callable[..., Array]
) -> Callable[..., Array] | None:
    """How CPUs compute a product for which `plain` is slow there; None where it is not.

    A few rows and a matrix: by a kernel, if the program has kernels. One row of bfloat16: as two equal rows, of which
    one is kept. XLA takes five to seven times as long for one row as for two, since only two take the instructions for
    bfloat16 that some CPUs have.
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
    if kernels == "native" and matrix and products_cpu.takes(rows, summed, columns, dtype, turned):

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
