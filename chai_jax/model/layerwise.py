"""A model layer by layer over fixed text: what surgery and measurements that change one layer at a time need.

Hidden states are carried along, so that only one layer's program is compiled and run at a time, and no second copy of a
large model ever exists.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from chai_jax.model import kernels
from chai_jax.model.decoder import OPT, Block, Seen, visible
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec


@runtime_checkable
class Text(Protocol):
    """Token windows int32 [N, W], padded on the right, and their mask bool [N, W]; a `Probe` is one."""

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def mask(self) -> np.ndarray: ...


def rest_of(params: Params) -> Params:
    """The parameters outside the layers."""
    return {name: leaf for name, leaf in params.items() if name != "layers"}


def embed(model: Model, tokens: Any, mask: Any) -> Float[Array, "N W D"]:
    """What enters the first layer, in float32."""
    return _embed(model.config, rest_of(model.params), tokens, mask)


def through(model: Model, index: int, x: Float[Array, "N W D"], mask: Any) -> Float[Array, "N W D"]:
    """What leaves layer `index` when `x` enters it, in float32."""
    return through_layer(model.config, model.spec.layers[index], model.params["layers"][str(index)], x, mask)


def through_layer(
    config: Architecture, layer: LayerSpec, params: Params, x: Float[Array, "N W D"], mask: Any
) -> Float[Array, "N W D"]:
    """`through` for a layer that is no model's (yet)."""
    return _through(config, anonymous(layer), params, x, mask)


def anonymous(layer: LayerSpec) -> LayerSpec:
    """The layer without the numbers of its heads, which the forward pass does not read: layers share programs.

    Only prompts shorter than the warm-up, where clusters are found per prompt, depend on them.
    """
    return layer if layer.membership == "prompt" else dataclasses.replace(layer, clusters=())


def seen_through(
    config: Architecture, layer: LayerSpec, params: Params, x: Float[Array, "N W D"], mask: Array
) -> tuple[Float[Array, "N W D"], Seen]:
    """What leaves a layer when `x` enters it, and what its attention sees and does; to be called inside jit."""
    _, allowed, start, _ = visible(mask, None)
    with kernels.plain_attention():
        after, _, seen = Block(config, layer, params)(x, allowed, None, start)
    return after, seen


@partial(jax.jit, static_argnums=0)
def _embed(config: Architecture, params: Params, tokens: Array, mask: Array) -> Float[Array, "N W D"]:
    return OPT(config, Spec(()), params).embed(tokens, visible(mask, None)[0], jnp.float32)


@partial(jax.jit, static_argnums=(0, 1))
def _through(config: Architecture, layer: LayerSpec, params: Params, x: Array, mask: Array) -> Float[Array, "N W D"]:
    return seen_through(config, layer, params, x, mask)[0]
