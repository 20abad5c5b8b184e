"""Second moments on calibration text: of what enters a layer, and of what a merged attention offers and should."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from chai_jax.compress.merge import InputMoments, OutputMoments
from chai_jax.model.params import OPTConfig, Params
from chai_jax.model.quantized import dequantize
from chai_jax.model.stream import anonymous, attention_of
from chai_jax.spec import LayerSpec

BATCH = 8  # windows of one pass


def input_moments(
    config: OPTConfig, layer: LayerSpec, params: Params, x: Float[Array, "N W D"], mask: Any
) -> InputMoments:
    """Of the normed input of a layer that `x` enters; only real tokens count."""
    total = _sum(partial(_input_moments, config, anonymous(layer)), params, x, mask)
    return InputMoments(total / total[-1, -1])


def output_moments(
    config: OPTConfig, layers: tuple[LayerSpec, LayerSpec], params: tuple[Params, Params], x: Any, mask: Any
) -> list[OutputMoments]:
    """One per cluster of the second layer, a `qkv` one: its attention P_c on the normed input x gives Z = P_c x; the
    joint output of its heads in the first, a dense layer, value biases included, is Y.

    Args:
        layers: the dense layer and the merged one, of which only queries and keys are read.
        params: of both.
        x: [N, W, D], what enters the layer.
    """
    sums = partial(_output_moments, config, tuple(map(anonymous, layers)), layers[1].clusters, layers[0].clusters)
    total = _sum(sums, params, x, mask)
    width, count = config.hidden_size, total["count"]
    found = []
    for pairs in total["pairs"] / count:
        mean = pairs[0, 1:]
        centred = pairs[1:, 1:] - np.outer(mean, mean)
        found.append(OutputMoments(mean[:width], mean[width:], centred[:width, :width], centred[:width, width:]))
    return found


def _sum(function: Any, params: Any, x: Any, mask: Any) -> Any:
    """Add up `function(params, x, mask)` over batches, in float64."""
    total: Any = None
    for at in range(0, len(x), BATCH):
        room = BATCH - len(x[at : at + BATCH])
        part = (
            jnp.pad(x[at : at + BATCH], ((0, room), (0, 0), (0, 0))),
            np.pad(mask[at : at + BATCH], ((0, room), (0, 0))),
        )
        new = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(function(params, *part)))
        total = new if total is None else jax.tree.map(np.add, total, new)
    return total


@partial(jax.jit, static_argnums=(0, 1))
def _input_moments(config: OPTConfig, layer: LayerSpec, params: Params, x: Array, mask: Array) -> Float[Array, "D1 D1"]:
    seen = attention_of(config, layer, params, x, mask)
    return _second_moment(jnp.pad(seen.x, ((0, 0), (0, 0), (0, 1)), constant_values=1.0), mask)


def _second_moment(rows: Float[Array, "N W X"], mask: Array) -> Float[Array, "X X"]:
    rows = jnp.where(mask[..., None], rows, 0.0)
    return jnp.einsum("nwx,nwy->xy", rows, rows, precision="highest")


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _output_moments(
    config: OPTConfig,
    layers: tuple[LayerSpec, LayerSpec],
    clusters: tuple[tuple[int, ...], ...],
    stored: tuple[tuple[int, ...], ...],
    params: tuple[Params, Params],
    x: Array,
    mask: Array,
) -> dict[str, Array]:
    """Second moments of [1, Z_c, Y_c] for every cluster c."""
    dense, merged = (attention_of(config, layer, tree, x, mask) for layer, tree in zip(layers, params, strict=True))
    kernel, place = dequantize(params[0]["output"]["kernel"]), {heads[0]: at for at, heads in enumerate(stored)}

    def moment(cluster: int, heads: tuple[int, ...]) -> Array:
        members = jnp.asarray([place[head] for head in heads])
        offered = jnp.einsum("nts,nsd->ntd", merged.probabilities[:, cluster], dense.x, precision="highest")
        wanted = jnp.einsum("nhtr,hrd->ntd", dense.heads[:, members], kernel[members], precision="highest")
        return _second_moment(jnp.concatenate([jnp.ones_like(x[..., :1]), offered, wanted], axis=-1), mask)

    pairs = jnp.stack([moment(at, heads) for at, heads in enumerate(clusters)])
    return {"pairs": pairs, "count": mask.sum(dtype=jnp.float32)}
