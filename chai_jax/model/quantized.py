"""Quantized arrays as types, int8 by slices and int4 by groups, and the product that reads any kind of weight."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from chai_jax.model.products import product


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


@partial(jax.tree_util.register_dataclass, data_fields=["packed", "scale", "low"], meta_fields=["axis", "group", "odd"])
@dataclasses.dataclass(frozen=True)
class Int4Array:
    """Asymmetric int4: along `axis`, each `group` neighbours (the last group may be smaller) have a scale and a lowest.

    Laws: `original ~ number * scale + low` with numbers 0 to 15; an entry's error is at most half its scale; zeros
    come back as zeros. Two neighbours share a byte, the first in its low half. `axis` is negative, so that leading
    (batch) axes may come and go.
    """

    # Any, because tree operations put other things (shapes, shardings) in their places.
    packed: Any  # uint8, shaped as the original, half as long along the axis (rounded up)
    scale: Any  # bfloat16, shaped as the original, one entry a group along the axis
    low: Any  # bfloat16, likewise
    axis: int
    group: int
    odd: bool  # whether the last byte along the axis holds one number only

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.packed.shape)
        shape[self.axis] = 2 * shape[self.axis] - self.odd
        return tuple(shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales and lowest values included."""
        return self.packed.nbytes + self.scale.nbytes + self.low.nbytes


Quantized = QuantizedArray | Int4Array
Leaf = Array | Quantized


def is_leaf(value: object) -> bool:
    """Whether a value is a quantized array; for `jax.tree.map(..., is_leaf=is_leaf)`, which then takes it whole."""
    return isinstance(value, Quantized)


def quantize_int8(
    x: Float[Array, "..."], axes: tuple[int, ...], scale_dtype: DTypeLike = jnp.bfloat16
) -> QuantizedArray:
    """Quantize to int8, one scale per slice along `axes` (negative).

    The scale is absmax / 127, rounded up in `scale_dtype` before it is used, so that no entry can exceed 127. No
    gradient flows through it: training passes its gradient straight around (`chai_jax.model.cache.through_storage`).
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    scale = _scale(jnp.max(jnp.abs(x), axis=axes), 127, scale_dtype)
    values = jnp.round(x / jnp.expand_dims(scale.astype(jnp.float32), axes)).astype(jnp.int8)
    return QuantizedArray(values, scale, axes)


def _scale(span: Float[Array, "..."], steps: int, dtype: DTypeLike) -> Float[Array, "..."]:
    """The smallest scale of `dtype` of which `steps` make up `span`; 1 where XLA would flush it to 0.

    Compared by the product, which is exact: a quotient's rounding, which is the compiler's choice, would decide
    whether a span that is just so many steps has the next scale.
    """
    exact = jnp.where(span / steps < float(jnp.finfo(dtype).tiny), 1.0, span / steps)
    scale = exact.astype(dtype)
    return _next_if(steps * scale.astype(jnp.float32) < span, scale, jnp.inf)


def _next_if(condition: Bool[Array, "..."], x: Float[Array, "..."], towards: float) -> Float[Array, "..."]:
    return jnp.where(condition, jnp.nextafter(x, jnp.full_like(x, towards)), x)


@partial(jax.jit, static_argnames=("axis", "group"))  # one program a shape instead of one per operation
def quantize_int4(x: Float[Array, "..."], axis: int, group: int) -> Int4Array:
    """Quantize to int4 with a bfloat16 scale and lowest value for each `group` neighbours along `axis` (negative).

    The lowest value is rounded down, then the scale, (highest - lowest) / 15, up: no entry can leave 0 to 15. Zero
    points, since keys (Liu et al. 2024, KIVI, arXiv 2402.02750) have channels that are far from zero and vary little:
    a symmetric grid spends its sixteen steps on the distance. No gradient flows through it.
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    at = x.ndim + axis
    size = x.shape[at]
    count = -(-size // group)
    padded = jnp.pad(x, [(0, count * group - size if i == at else 0) for i in range(x.ndim)], mode="edge")
    grouped = padded.reshape(*x.shape[:at], count, group, *x.shape[at + 1 :])
    low = grouped.min(at + 1).astype(jnp.bfloat16)
    low = _next_if(low.astype(jnp.float32) > grouped.min(at + 1), low, -jnp.inf)
    lowest = low.astype(jnp.float32)
    scale = _scale(grouped.max(at + 1) - lowest, 15, jnp.bfloat16)
    steps = (grouped - jnp.expand_dims(lowest, at + 1)) / jnp.expand_dims(scale.astype(jnp.float32), at + 1)
    numbers = jnp.round(steps).astype(jnp.uint8).reshape(padded.shape)
    numbers = jax.lax.slice_in_dim(numbers, 0, size, axis=at)
    numbers = jnp.pad(numbers, [(0, size % 2 if i == at else 0) for i in range(x.ndim)])
    first, second = (jax.lax.slice_in_dim(numbers, start, None, stride=2, axis=at) for start in (0, 1))
    return Int4Array(first | second << 4, scale, low, axis, group, bool(size % 2))


@jax.jit
def _dequantize_int4(x: Int4Array) -> Float[Array, "..."]:
    at, size = x.packed.ndim + x.axis, x.shape[x.axis]
    pairs = jnp.stack([x.packed & 15, x.packed >> 4], axis=at + 1)
    numbers = pairs.reshape(*x.packed.shape[:at], 2 * x.packed.shape[at], *x.packed.shape[at + 1 :])

    def per_entry(each: Array) -> Array:
        return jnp.repeat(each.astype(jnp.float32), x.group, axis=at, total_repeat_length=each.shape[at] * x.group)

    scale, low = (jax.lax.slice_in_dim(per_entry(each), 0, size, axis=at) for each in (x.scale, x.low))
    return jax.lax.slice_in_dim(numbers, 0, size, axis=at).astype(jnp.float32) * scale + low


def quantize_like(x: Float[Array, "..."], like: Quantized) -> Quantized:
    """Quantize in the format of `like`, of which only structure and dtypes are read."""
    if isinstance(like, Int4Array):
        return quantize_int4(x, like.axis, like.group)
    return quantize_int8(x, like.axes, like.scale.dtype)


def dequantize(x: Leaf, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """The array a leaf stands for, in `dtype`."""
    if isinstance(x, QuantizedArray):
        scale = jnp.expand_dims(x.scale.astype(jnp.float32), x.axes)
        return (x.values.astype(jnp.float32) * scale).astype(dtype)
    return (_dequantize_int4(x) if isinstance(x, Int4Array) else x).astype(dtype)


def multiply(equation: str, x: Float[Array, "..."], weights: Leaf, kernels: str) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, weights)` in x's dtype, accumulated in float32, for plain or quantized weights.

    The scales of int8 weights run over their output axes only (the last ones of the result), so they scale the result.
    int4 weights have scales along the contracted axis and are read back first.

    Args:
        equation: in it `t` is the axis of x that counts tokens.
        kernels: see `chai_jax.model.products.product`.
    """
    stored = weights.values if isinstance(weights, QuantizedArray) else dequantize(weights, x.dtype)
    y = product(equation, x, stored, row="t", kernels=kernels)
    if isinstance(weights, QuantizedArray):
        y = y * weights.scale.astype(jnp.float32)
    return y.astype(x.dtype)
