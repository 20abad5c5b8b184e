"""How little damage any code could do to a cache at so many bits: the rate-distortion bound of the weighed spectra.

To second order the squared error of a layer's output is a sum over tokens of e' M e, e being the error of a key or a
value and M the weight of `chai_jax.compress.key_basis` (for values, the mean of a^2 summed over the queries, times
W W'). In the eigenbasis of M^(1/2) C M^(1/2), C being the covariance, a Gaussian source of variance v costs at least d
at a rate of log2(v / d) / 2 bits, and the least sum of costs cuts all variances at one level (reverse water-filling;
Cover and Thomas 2006, theorem 10.3.3). Values count by what their own keys do not foretell. Each layer's squared error
becomes nats by the ratio that a real cache of that layer showed.

No code that takes tokens one by one, and foretells them from their own layer alone, does better in this model; it is no
bound for codes that use other tokens or layers. Real codes pay for scales, have no entropy coder, and round to a grid.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from chai_jax.analyse.damage import Damage
from chai_jax.compress.basis_stream import BasisStream
from chai_jax.compress.key_basis import EVERY, in_one_program, key_moments, observed, read_later, stored_tokens
from chai_jax.compress.moments import summed
from chai_jax.console import track
from chai_jax.model.execution import Execution
from chai_jax.model.layerwise import Text, anonymous, how_in_float32, through_layer
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import dequantize
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec

TRIED, BITS = "basis3", 2.4  # the real cache by which squared errors become nats


Spectrum = Float[np.ndarray, " n"]  # variances of all numbers that a layer caches of a token, in nats


def spectra(model: Model, fit: Text, text: tuple[np.ndarray, np.ndarray]) -> list[Spectrum]:
    """Of all layers of a dense model; nats are measured on `text`."""
    stream, damage, found = BasisStream(model, fit), Damage(model, *text), []
    for index in track(range(model.config.num_layers), "Reading spectra"):
        layer, params = damage.model.spec.layers[index], model.params["layers"][str(index)]
        about = (model.config, anonymous(layer), how_in_float32(model))
        keys = summed(partial(key_moments, *about), params, stream.x, stream.mask)
        values = summed(partial(_value_moments, *about), params, stream.x, stream.mask)
        squared = np.concatenate([_of_keys(keys).ravel(), _of_values(values, params).ravel()])
        found.append(squared * _nats(damage, stream, layer, params))
        stream.advance()
    return found


def least(spectra: list[Spectrum], bits: float) -> float:
    """The least nats a token at so many bits a number, over all layers."""
    variances = np.maximum(np.concatenate(spectra), 1e-30)
    low, high = np.log(variances.min()) - 2 * np.log(2) * bits, np.log(variances.max())
    for _ in range(100):
        level = (low + high) / 2
        rate = np.maximum(np.log(variances) - level, 0).sum() / (2 * np.log(2))
        low, high = (level, high) if rate > bits * len(variances) else (low, level)
    return float(np.minimum(variances, np.exp(high)).sum())


def _weighed(covariance: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Variances in the eigenbasis of M^(1/2) C M^(1/2), which are the eigenvalues of C M; [C, R]."""
    return np.maximum(np.linalg.eigvals(covariance @ weight).real, 0.0)


def _of_keys(total: dict[str, np.ndarray]) -> np.ndarray:
    mean = total["key"] / total["count"]
    covariance = total["pairs"] / total["count"] - mean[:, :, None] * mean[:, None]
    return _weighed(covariance, EVERY * total["asked"] / total["count"])


def _of_values(total: dict[str, np.ndarray], params: Params) -> np.ndarray:
    """Of what is left over of values when their keys are known exactly."""
    known, both, own = (total[name] / total["count"] for name in ("known", "both", "own"))
    ridge = 1e-6 * np.trace(known, axis1=1, axis2=2)[:, None, None] * np.eye(known.shape[1])
    left = own - np.swapaxes(both, 1, 2) @ np.linalg.solve(known + ridge, both)
    kernel = np.asarray(dequantize(params["output"]["kernel"]), np.float64)
    kernel = kernel.reshape(*total["read"].shape, *kernel.shape[1:])
    weight = np.einsum("cq,cqrd,cqkd->crk", EVERY * total["read"] / total["count"], kernel, kernel)
    return _weighed(left, weight)


def _nats(damage: Damage, stream: BasisStream, layer: LayerSpec, params: Params) -> float:
    """KL over the mean squared error of a layer's output, of a real cache of few bits in this layer alone."""
    channels, index = stream.basis.channels(BITS), stream.index
    channels, basis = in_one_program(stream.params(channels), channels, damage.model.config.head_dim)
    changed = layer.stored_as([TRIED] * len(layer.storages), channels)
    before, after = damage.entering[index : index + 2]
    x = through_layer(damage.model, changed, {**params, "basis": basis}, before, damage.mask)
    squared = float(jnp.sum(jnp.where(damage.mask[..., None], x - after, 0.0) ** 2) / damage.mask.sum())
    return damage.of(index, changed, {**params, "basis": basis})[0] / squared


@partial(jax.jit, static_argnums=(0, 1, 2))
def _value_moments(
    config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Array, mask: Array
) -> dict[str, Array]:
    """Sums over tokens of the products of [1, key] and value, and over queries of the attention squared: [C, q]."""
    seen, key, value, query = observed(config, layer, how, params, x, mask)
    real = stored_tokens(mask)[:, None, :, None]
    known = jnp.where(real, jnp.pad(key, ((0, 0),) * 3 + ((1, 0),), constant_values=1.0), 0.0)
    value = jnp.where(real, value, 0.0)
    attention = seen.probabilities[:, :, ::EVERY].reshape(*query.shape[:3], -1, mask.shape[1])
    product = partial(jnp.einsum, precision="highest")
    return {
        "known": product("bctn,bctm->cnm", known, known),
        "both": product("bctn,bctr->cnr", known, value),
        "own": product("bctn,bctr->cnr", value, value),
        "read": jnp.sum(jnp.where(read_later(mask)[:, None, None], attention**2, 0.0), axis=(0, 3, 4)),
        "count": stored_tokens(mask).sum(dtype=jnp.float32),
    }
