"""Products of a few rows with a matrix on a CPU: products_cpu.cc reads the matrix once, as it lies."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

MOST = 8  # rows: one vector of sums for each stays in registers
STORED = ("float32", "bfloat16", "int8")
LEAST = 2**20  # products of a row's entry and a weight: of fewer XLA makes no threads, and is done sooner
COLUMNS, TERMS = 32, 16  # of which the matrix has a multiple: two of the widest vectors, and one


def takes(rows: int, terms: int, columns: int, dtype: str, turned: bool) -> bool:
    """Whether the kernel is for so many rows times a matrix [terms, columns], or `turned` [columns, terms].

    int8, which XLA would expand first, is for it however small.
    """
    fits = rows <= MOST and terms % TERMS == 0 and (turned or columns % COLUMNS == 0)
    return fits and dtype in STORED and rows * terms * columns >= (1 if dtype == "int8" else LEAST)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def times(rows: Float[Array, "M K"], matrix: Num[Array, "_ _"], turned: bool) -> Float[Array, "M N"]:
    """rows @ matrix [K, N], or @ matrix.T where it is `turned` [N, K]; float32. Of what `takes` accepts."""
    shape = jax.ShapeDtypeStruct((rows.shape[0], matrix.shape[0 if turned else 1]), jnp.float32)
    call = jax.ffi.ffi_call("chai_jax_few_rows", shape, vmap_method="sequential")
    out: Array = call(rows.astype(jnp.float32), matrix, turned=turned)
    return out


@times.defjvp
def _(turned: bool, primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    """A product is linear in either operand; XLA multiplies here, which can transpose it for a gradient."""
    (rows, matrix), (new_rows, new_matrix) = primals, tangents
    plain = partial(jnp.einsum, "mk,nk->mn" if turned else "mk,kn->mn", preferred_element_type=jnp.float32)
    change = plain(new_rows, matrix.astype(rows.dtype))
    if matrix.dtype != jnp.int8:  # of which there are no small changes
        change += plain(rows, new_matrix)
    return times(rows, matrix, turned), change
