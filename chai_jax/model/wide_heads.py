"""Heads that share their attention, laid side by side: one wide head, and one matmul, in place of several."""

import jax.numpy as jnp
from jaxtyping import Array, Float


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
