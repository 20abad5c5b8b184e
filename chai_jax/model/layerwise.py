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

from chai_jax.model.decoder import block, embed
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.place import locate
from chai_jax.model.self_attention import Seen
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec


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


def how_in_float32(model: Model) -> Execution:
    """As the model's programs run, but in float32, whatever the device computes in otherwise."""
    return model.how.replace(dtype=jnp.dtype(jnp.float32))


def embed_text(model: Model, tokens: Any, mask: Any) -> Float[Array, "N W D"]:
    """What enters the first layer, in float32."""
    return _embed(model.config, how_in_float32(model), rest_of(model.params), tokens, mask)


def through(model: Model, index: int, x: Float[Array, "N W D"], mask: Any) -> Float[Array, "N W D"]:
    """What leaves layer `index` when `x` enters it, in float32."""
    return through_layer(model, model.spec.layers[index], model.params["layers"][str(index)], x, mask)


def through_layer(
    model: Model, layer: LayerSpec, params: Params, x: Float[Array, "N W D"], mask: Any
) -> Float[Array, "N W D"]:
    """`through` for a layer that is not (yet) the model's."""
    return _through(model.config, anonymous(layer), how_in_float32(model), with_pairs(layer, params), x, mask)


def anonymous(layer: LayerSpec) -> LayerSpec:
    """The layer without the numbers of its heads, which the forward pass does not read: layers share programs.

    Only prompts shorter than the warm-up, where clusters are found per prompt, depend on them.
    """
    return layer if layer.membership == "prompt" else dataclasses.replace(layer, clusters=(), pairs=())


def with_pairs(layer: LayerSpec, params: Params) -> Params:
    """A layer's parameters with the frequencies of its rotary keys, which its anonymous self does not know."""
    return {**params, "pairs": jnp.asarray(layer.pairs, jnp.int32)} if layer.pairs else params


def seen_through(
    config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Float[Array, "N W D"], mask: Array
) -> tuple[Float[Array, "N W D"], Seen]:
    """What leaves a layer when `x` enters it, and what its attention sees and does; to be called inside jit."""
    after, _, seen = block(config, layer, params, x, locate(mask), None, how=how, plain=True)
    return after, seen


@partial(jax.jit, static_argnums=(0, 1))
def _embed(config: Architecture, how: Execution, params: Params, tokens: Array, mask: Array) -> Float[Array, "N W D"]:
    return embed(config, params, tokens, locate(mask).positions, how)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _through(
    config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Array, mask: Array
) -> Float[Array, "N W D"]:
    return seen_through(config, layer, how, params, x, mask)[0]
