"""Products of rows with a matrix on a CPU: of a few rows cpu.cc reads the matrix once, as it lies; of many rows
matrix_unit.cc takes the CPU's matrix unit, where there is one (Intel's AMX)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from chai_jax.model.kernels import cpu

MOST = 8  # of a few rows: one vector of sums for each stays in registers
STORED = ("float32", "bfloat16", "int8")
LEAST = 2**20  # products of a row's entry and a weight: of fewer XLA makes no threads, and is done sooner
COLUMNS, TERMS = 32, 16  # of which the matrix has a multiple: two of the widest vectors, and one
MANY = 32  # rows, of as many terms and columns each: a panel of the matrix unit
MANY_LEAST = 2**25  # as `LEAST`: of fewer XLA was faster (chains of layers of 64 to 768 rows, two cores)
PACKED = 1536  # rows at once
PARTS = 3  # bfloat16 that a float32 is the sum of


def takes(rows: int, terms: int, columns: int, dtype: str, turned: bool) -> bool:
    """Whether a kernel is for so many rows times a matrix [terms, columns], or `turned` [columns, terms].

    A few rows of int8, which XLA would expand first, are for it however small.
    """
    work = rows * terms * columns
    if rows <= MOST:
        fits = terms % TERMS == 0 and (turned or columns % COLUMNS == 0)
        return rows >= 1 and dtype in STORED and fits and (dtype == "int8" or work >= LEAST)
    # bfloat16 has XLA's own way to the matrix unit, which is as fast.
    fits = terms % MANY == columns % MANY == 0 and not turned and dtype in ("float32", "int8")
    return rows >= MANY and fits and work >= MANY_LEAST and cpu.matrix_unit()


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def times(rows: Float[Array, "M K"], matrix: Num[Array, "_ _"], turned: bool) -> Float[Array, "M N"]:
    """rows @ matrix [K, N], or @ matrix.T where it is `turned` [N, K]; float32. Of what `takes` accepts."""
    count, terms = rows.shape
    shape = jax.ShapeDtypeStruct((count, matrix.shape[0 if turned else 1]), jnp.float32)
    call = partial(jax.ffi.ffi_call, vmap_method="sequential")
    if count <= MOST:
        few: Array = call("chai_jax_few_rows", shape)(rows.astype(jnp.float32), matrix, turned=turned)
        return few
    if not (rows.dtype == jnp.bfloat16 and matrix.dtype == jnp.int8):
        rows, matrix = (x if x.dtype == jnp.int8 else x.astype(jnp.float32) for x in (rows, matrix))
    panels = -(-min(count, PACKED) // MANY) * MANY * terms
    packed = jax.ShapeDtypeStruct((panels * 2 * (PARTS if rows.dtype == jnp.float32 else 1),), jnp.uint8)
    many: Array = call("chai_jax_many_rows", (shape, packed))(rows, matrix)[0]
    return many


@times.defjvp
def _(turned: bool, primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    """A product is linear in either operand; XLA multiplies here, which can transpose it for a gradient."""
    (rows, matrix), (new_rows, new_matrix) = primals, tangents
    plain = partial(jnp.einsum, "mk,nk->mn" if turned else "mk,kn->mn", preferred_element_type=jnp.float32)
    change = plain(new_rows, matrix.astype(rows.dtype))
    if matrix.dtype != jnp.int8:  # of which there are no small changes
        change += plain(rows, new_matrix)
    return times(rows, matrix, turned), change
