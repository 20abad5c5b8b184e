"""An int8 array with its scale, as one type, and the einsum that reads either kind of weight."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """Symmetric int8 with one scale for each slice along `axes`.

    Laws: `scale.shape` is `values.shape` without `axes`; `original ~ values * expand_dims(scale, axes)`; an entry's
    error is at most half its scale; a slice of zeros has scale 1. `axes` are negative, so that leading (batch) axes may
    come and go.
    """

    # Any, because tree operations put other things (shapes, shardings) in their places.
    values: Any  # int8 [...]
    scale: Any  # bfloat16 or float32
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def nbytes(self) -> int:
        """Bytes as stored, the scale included."""
        return self.values.nbytes + self.scale.nbytes


Leaf = Array | QuantizedArray


def is_leaf(value: object) -> bool:
    """For `jax.tree.map(..., is_leaf=is_leaf)`: take a quantized array whole."""
    return isinstance(value, QuantizedArray)


def quantize(x: Float[Array, "..."], axes: tuple[int, ...], scale_dtype: DTypeLike = jnp.bfloat16) -> QuantizedArray:
    """Quantize to int8, one scale per slice along `axes` (negative).

    The scale is absmax / 127, rounded up in `scale_dtype` before it is used, so that no entry can exceed 127. No
    gradient flows through it: training passes its gradient straight around (`chai_jax.model.cache.through_storage`).
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    peak = jnp.max(jnp.abs(x), axis=axes)
    # Below the smallest normal number XLA would flush the scale to 0; so small a slice is stored as zeros.
    exact = jnp.where(peak / 127 < float(jnp.finfo(scale_dtype).tiny), 1.0, peak / 127)
    scale = exact.astype(scale_dtype)
    scale = jnp.where(scale.astype(jnp.float32) < exact, jnp.nextafter(scale, jnp.full_like(scale, jnp.inf)), scale)
    values = jnp.round(x / jnp.expand_dims(scale.astype(jnp.float32), axes)).astype(jnp.int8)
    return QuantizedArray(values, scale, axes)


def dequantize(x: Leaf, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """The array a leaf stands for, in `dtype`."""
    if isinstance(x, QuantizedArray):
        scale = jnp.expand_dims(x.scale.astype(jnp.float32), x.axes)
        return (x.values.astype(jnp.float32) * scale).astype(dtype)
    return x.astype(dtype)


def einsum(equation: str, x: Float[Array, "..."], kernel: Leaf) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, kernel)` in x's dtype, accumulated in float32, for a plain or a quantized kernel.

    A quantized kernel's scale runs over its output axes only (the last ones of the result), so it scales the result.
    """
    weights = kernel.values if isinstance(kernel, QuantizedArray) else kernel
    y = jnp.einsum(equation, x, weights.astype(x.dtype), preferred_element_type=jnp.float32)
    if isinstance(kernel, QuantizedArray):
        y = y * kernel.scale.astype(jnp.float32)
    return y.astype(x.dtype)
