"""The maps that a decoder is made of, as Flax NNX modules over plain trees: their leaves may be quantized."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from chai_jax.model.params import Params
from chai_jax.model.quantized import Leaf, dequantize, einsum

NORM_EPSILON = 1e-5


def parameter(value: Leaf | None) -> Any:
    """A leaf as a variable of a module; None stays None."""
    return None if value is None else nnx.Param(value)


def value_of(param: Any) -> Any:
    """The leaf of a variable."""
    return param.get_value()


class Projection(nnx.Module):
    """A linear map given by an einsum; its kernel may be quantized."""

    def __init__(self, equation: str, params: Params):
        self.equation = equation
        self.kernel = parameter(params["kernel"])
        self.bias = parameter(params.get("bias"))

    def __call__(self, x: Array) -> Array:
        y = einsum(self.equation, x, value_of(self.kernel))
        return y if self.bias is None else y + dequantize(value_of(self.bias), x.dtype)


class Heads(Projection):
    """Project the width to heads: [B, T, D] -> [B, heads, T, R]."""

    def __init__(self, params: Params):
        super().__init__("btd,dhr->bthr", params)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B heads T R"]:
        return jnp.swapaxes(super().__call__(x), 1, 2)


class Norm(nnx.Module):
    """Layer norm over the width, in float32."""

    def __init__(self, params: Params):
        self.scale = parameter(params.get("scale"))
        self.bias = parameter(params.get("bias"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + NORM_EPSILON)
        if self.scale is not None:
            y = y * dequantize(value_of(self.scale))
        if self.bias is not None:
            y = y + dequantize(value_of(self.bias))
        return y.astype(x.dtype)


def at_columns(x: Any, columns: Int32[Array, "B N"] | None, axis: int) -> Any:
    """Of an array [B, ...] whose `axis` counts a sequence's tokens those at its `columns`; None: all."""
    if columns is None:
        return x
    shape = [1] * x.ndim
    shape[0], shape[axis] = columns.shape
    return jnp.take_along_axis(x, columns.reshape(shape), axis=axis)
