"""Slices of arrays whose sequences differ in where: a start for each, or one for all."""

from functools import partial

import jax
from jaxtyping import Array, Int32, Shaped

Starts = Int32[Array, "..."]  # [B], or [] where all have the same


def slice_rows(x: Shaped[Array, "B ..."], start: Starts, size: int, axis: int) -> Shaped[Array, "B ..."]:
    """`size` entries of each sequence along `axis` (1 or later), from its own start on."""
    if start.ndim == 0:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
    return jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=axis - 1))(x, start)


def put_rows(
    x: Shaped[Array, "B ..."], part: Shaped[Array, "B ..."], start: Starts, axis: int
) -> Shaped[Array, "B ..."]:
    """x with a part of each sequence replaced along `axis` (1 or later), from its own start on."""
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(x, part, start)
