"""What the kernels of decoding have in common, whatever they run on."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from chai_jax.model.quantized import QuantizedArray

MASKED = float(jnp.finfo(jnp.float32).min)  # finite, as in `scores_of`: a row that may read nothing reads all alike


def stored_parts(leaf: Any) -> tuple[Array, Array | None]:
    """A stored array and, of int8, its scales [B, heads, S]."""
    return (leaf.values, leaf.scale) if isinstance(leaf, QuantizedArray) else (leaf, None)


def masked(scores: Array, allowed: Array, inside: Array) -> Array:
    """Columns that may not be read, as in `scores_of`; what lies outside of the cache has no weight at all."""
    return jnp.where(inside, jnp.where(allowed, scores, MASKED), -jnp.inf)
