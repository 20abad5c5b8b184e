"""Models for users of Flax: the parameter tree as an `nnx.Module`, and back. The only file that imports flax.

The functions of `chai_jax.model.decoder` do the work. The module holds the tree as variables, so that NNX's own tools
split, train, update and shard it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.decoder import forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import is_leaf
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec


class QuantizedVariable(nnx.Variable[Any]):
    """A quantized array as one variable. It has no gradient: `nnx.grad` and optimizers of `nnx.Param` pass it by."""


class FlaxModel(nnx.Module):
    """A model as `to_flax` makes it: `module(tokens, mask)` gives logits.

    Attributes:
        params: the variables, where `Model.params` has the arrays: `module.params["layers"]["0"]["up"]["kernel"]`.
            Arrays are `nnx.Param`, quantized ones `QuantizedVariable`.
        config, spec, how: what of the model is no array; static for NNX's transformations.
    """

    def __init__(self, config: Architecture, spec: Spec, how: Execution, params: Params):
        self.config, self.spec, self.how = config, spec, how
        self.params = _module(params)

    def __call__(
        self, tokens: Int32[Array, "B T"], mask: Bool[Array, "B T"] | None = None, *, remat: bool = False
    ) -> Float[Array, "B T V"]:
        """float32 logits of tokens; the mask is True at real tokens (all, if not given). Not compiled: see `nnx.jit`.

        Args:
            remat: keep only each layer's input for a backward pass, which computes the layer again.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        params = _arrays(self.params)
        hidden = forward(self.config, self.spec, params, tokens, mask, self.how, remat=remat).hidden
        return unembed(self.config, params, hidden, self.how)


def to_flax(model: Model) -> FlaxModel:
    """The model as a Flax NNX module that shares its arrays.

    It runs as the model does, but by XLA alone, since not every kernel has a gradient. Each `nnx.Param` says by its
    `out_sharding` over which axes of the model's mesh it is split: `nnx.get_named_sharding(nnx.state(module), mesh)` is
    where the layout would put it. Quantized arrays say nothing and are whole on every device.
    """
    how = model.how.replace(kernels="xla")
    targets = how.layout.shardings(model.config, model.spec)

    def variable(leaf: Any, target: jax.NamedSharding) -> nnx.Variable[Any]:
        if is_leaf(leaf):
            return QuantizedVariable(leaf)
        return nnx.Param(leaf, out_sharding=tuple(target.spec), eager_sharding=False)

    return FlaxModel(model.config, model.spec, how, jax.tree.map(variable, model.params, targets, is_leaf=is_leaf))


def from_flax(module: FlaxModel, model: Model) -> Model:
    """The immutable model with the module's arrays.

    Args:
        model: what `to_flax` was given. All but its parameters is kept: tokenizer, plan, execution, ...
    """
    return model.replace(params=_arrays(module.params))


def _module(tree: Any) -> Any:
    """Nested dicts of variables as NNX holds them."""
    return nnx.Dict({name: _module(child) for name, child in tree.items()}) if isinstance(tree, dict) else tree


def _arrays(held: Any) -> Any:
    """The values of `_module`'s variables, in nested dicts."""
    if isinstance(held, nnx.Variable):
        return held.get_value()
    return {name: _arrays(child) for name, child in held.items()}
