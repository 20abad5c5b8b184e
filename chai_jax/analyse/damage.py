"""What changing one layer does to a dense model's predictions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from chai_jax.compress.quantize import with_storage
from chai_jax.model.decoder import HEAD_ROWS, final_norm, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.layerwise import embed_text, how_in_float32, rest_of, through, through_layer
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec
from chai_jax.score.divergence import kl_divergence


class Damage:
    """KL and loss of a dense model with single layers replaced, on fixed text.

    What enters each layer is kept ([L + 1, N, W, D] float32), so a replacement costs the layers from it on. Layers that
    are not replaced are as loaded, with a float32 cache.
    """

    def __init__(self, model: Model, tokens: Int32[np.ndarray, "N W"], mask: Any):
        self.model, self.mask = with_storage(model, "float32"), jnp.asarray(mask)
        self.entering = [embed_text(self.model, jnp.asarray(tokens), self.mask)]
        for index in range(model.config.num_layers):
            self.entering.append(through(self.model, index, self.entering[index], self.mask))
        # Padding stands on the right: a position predicts the next token where there is one.
        self.predicts = np.pad(np.asarray(mask)[:, 1:], ((0, 0), (0, 1)))
        self.targets = jnp.asarray(np.asarray(tokens)[:, 1:][np.asarray(mask)[:, 1:]])

    def of(self, index: int, layer: LayerSpec, params: Params) -> tuple[float, float]:
        """(mean KL(dense || changed), mean rise of the loss), nats per token, with this in place of layer `index`."""
        x = through_layer(self.model, layer, params, self.entering[index], self.mask)
        for later in range(index + 1, self.model.config.num_layers):
            x = through(self.model, later, x, self.mask)
        return self.between(x)

    def of_output(self, index: int, layer: LayerSpec, params: Params) -> float:
        """Mean squared error of what layer `index` adds to its input, over real tokens, relative to what it adds."""
        before, after = self.entering[index : index + 2]
        x = through_layer(self.model, layer, params, before, self.mask)
        wrong, right = jax.device_get(_energies(before, after, x, self.mask))
        return float(wrong / right)

    def of_model(self, changed: Model) -> tuple[float, float]:
        """The same for a model that may differ in every layer."""
        x = self.entering[0]
        for index in range(changed.config.num_layers):
            x = through(changed, index, x, self.mask)
        return self.between(x)

    def within(self, changed: Model) -> tuple[float, np.ndarray]:
        """(KL of a model that may differ in every layer, by how much that falls with each layer as it was: [L])."""
        states, layers = [self.entering[0]], range(changed.config.num_layers)
        for index in layers:
            states.append(through(changed, index, states[index], self.mask))
        whole = self.between(states[-1])[0]
        without = []
        for index in layers:
            x = through(self.model, index, states[index], self.mask)
            for later in layers[index + 1 :]:
                x = through(changed, later, x, self.mask)
            without.append(self.between(x)[0])
        return whole, whole - np.asarray(without)

    def between(self, x: Float[Array, "N W D"]) -> tuple[float, float]:
        """KL and rise of the loss when this, not the dense model's states, leaves the last layer."""
        rest, truth = rest_of(self.model.params), self.entering[-1]
        how = how_in_float32(self.model)
        found = _compare(self.model.config, how, rest, self.targets, truth[self.predicts], x[self.predicts])
        divergence, rise = jax.device_get(found)
        return float(divergence), float(rise)


@jax.jit
def _energies(before: Array, after: Array, x: Array, mask: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared norms, over real tokens, of x - after and of after - before."""
    real = mask[..., None]
    return jnp.sum(jnp.where(real, (x - after) ** 2, 0)), jnp.sum(jnp.where(real, (after - before) ** 2, 0))


@partial(jax.jit, static_argnums=(0, 1))
def _compare(
    config: Architecture,
    how: Execution,
    params: Params,
    targets: Int32[Array, " M"],
    truth: Float[Array, "M D"],
    x: Float[Array, "M D"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean KL(truth || x) and mean rise of the loss over predictions, from hidden states after the last layer."""
    truth, x = (final_norm(config, params, states[None])[0] for states in (truth, x))

    def predictions(entry: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        target, *hidden = entry
        right, wrong = (jax.nn.log_softmax(unembed(config, params, rows, how)) for rows in hidden)
        rise = jnp.take_along_axis(right - wrong, target[:, None], axis=1)[:, 0]
        return kl_divergence(right, wrong), rise

    # Some rows at a time: the logits [M, V] of both models would be the largest arrays by far.
    count = len(targets)
    parts = jax.tree.map(lambda each: _in_parts(each, min(HEAD_ROWS, count)), (targets, truth, x))
    divergence, rise = (found.reshape(-1)[:count] for found in jax.lax.map(predictions, parts))
    return divergence.mean(), rise.mean()


def _in_parts(x: Array, rows: int) -> Array:
    """[M, ...] as [parts, rows, ...], with zeros behind the last."""
    return jnp.pad(x, ((0, -len(x) % rows), *((0, 0),) * (x.ndim - 1))).reshape(-1, rows, *x.shape[1:])
