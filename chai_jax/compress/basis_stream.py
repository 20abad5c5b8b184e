"""Bases for the layers of a model, one after the other, from calibration text on its way through it."""

import dataclasses
from functools import cached_property

import jax.numpy as jnp

from chai_jax.compress.calibration import joined
from chai_jax.compress.key_basis import KeyBasis, basis_params, find_basis, in_one_program
from chai_jax.console import track
from chai_jax.model.execution import Execution
from chai_jax.model.layerwise import Text, embed_text, how_in_float32, through
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.channels import Channels
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.spec import LayerSpec

TOKENS = 4096  # of calibration text, at most


class BasisStream:
    """`basis` and `params` are those of layer `index`, whose heads must not be merged where they are asked for."""

    def __init__(self, model: Model, text: Text):
        tokens, mask = joined(text, TOKENS, model.config.max_positions)
        self.model, self.mask, self.index = model, jnp.asarray(mask), 0
        self.x = embed_text(model, jnp.asarray(tokens), self.mask)

    def advance(self) -> None:
        """Go on to the next layer."""
        self.x = through(self.model, self.index, self.x, self.mask)
        self.index += 1
        self.__dict__.pop("basis", None)

    @cached_property
    def basis(self) -> KeyBasis:
        """See `find_basis`; found when it is first asked for."""
        return find_basis(*self._layer, x=self.x, mask=self.mask)

    def params(self, channels: Channels) -> Params:
        """What the layer's parameters hold as `basis`; see `basis_params`."""
        return basis_params(*self._layer, basis=self.basis, channels=channels, x=self.x, mask=self.mask)

    def plan(self, bits: float, storage: str) -> LayerPlan:
        """The layer with its keys in a basis, so many bits a number with their scales; `storage` is one of `BASIS`."""
        clusters = tuple(ClusterPlan((head,), storage=storage) for head in range(self.model.config.kv_heads))
        return LayerPlan(clusters, channels=self.basis.channels(bits))

    @property
    def _layer(self) -> tuple[Architecture, LayerSpec, Execution, Params]:
        index = self.index
        layer, params = self.model.spec.layers[index], self.model.params["layers"][str(index)]
        return self.model.config, layer, how_in_float32(self.model), params


def basis_plan(model: Model, text: Text, bits: float, storage: str) -> Plan:
    """A plan by which every layer of a dense model keeps its keys in a basis, with the same bits a number.

    Args:
        text: calibration windows; a probe will do.
        bits: of a key's number, scales included.
        storage: one of `BASIS`, which says how values are stored.
    """
    stream, layers = BasisStream(model, text), []
    for _ in track(range(model.config.num_layers), "Finding bases"):
        layers.append(stream.plan(bits, storage))
        stream.advance()
    return Plan(tuple(layers))


def sharing_programs(model: Model) -> Model:
    """The same model with bases of one shape, so that its layers share a program where they go one by one."""
    spec, layers = model.spec, dict(model.params["layers"])
    for index, layer in enumerate(spec.layers):
        if layer.channels:
            params = layers[str(index)]
            channels, basis = in_one_program(params["basis"], layer.channels, model.config.head_dim)
            spec = spec.with_layer(index, dataclasses.replace(layer, channels=channels))
            layers[str(index)] = {**params, "basis": basis}
    return model.replace(spec=spec, params={**model.params, "layers": layers})
