"""The maps that a decoder is made of, as functions of their parameters, which may be quantized."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from chai_jax.model.params import Params
from chai_jax.model.quantized import dequantize, multiply


def project(equation: str, params: Params, x: Array, kernels: str) -> Array:
    """A linear map in x's dtype, its `kernel` contracted as the equation says; the `bias` is added if there is one."""
    y = multiply(equation, x, params["kernel"], kernels)
    return y + dequantize(params["bias"], x.dtype) if "bias" in params else y


def project_to_heads(params: Params, x: Float[Array, "B T D"], kernels: str) -> Float[Array, "B heads T R"]:
    """A linear map from the width to heads."""
    return jnp.swapaxes(project("btd,dhr->bthr", params, x, kernels), 1, 2)


def norm(params: Params, x: Float[Array, "*rows D"], kind: str, epsilon: float) -> Float[Array, "*rows D"]:
    """Layer norm (`layer`) or root mean square norm (`rms`) over the last axis, computed in float32.

    Without parameters it neither scales nor shifts.
    """
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    if "scale" in params:
        y = y * dequantize(params["scale"])
    if "bias" in params:
        y = y + dequantize(params["bias"])
    return y.astype(x.dtype)


def at_columns(x: Any, columns: Int32[Array, "B N"] | None, axis: int) -> Any:
    """Of an array [B, ...] whose `axis` counts a sequence's tokens those at its `columns`; None: all."""
    if columns is None:
        return x
    shape = [1] * x.ndim
    shape[0], shape[axis] = columns.shape
    return jnp.take_along_axis(x, columns.reshape(shape), axis=axis)
