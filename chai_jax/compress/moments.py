"""Second moments on calibration text: of a layer's input, and of a merged attention with the output wanted from it.

Not every token counts alike. On a well-trained model most of the attention rests on the first token, whose state is
unlike all others: what is best for the average token is ruinous there. So a token counts by what errors of its key and
of its value do to the layer's output, where errors of tokens are independent of one another. a_ts is the attention of a
head's query t to token s.

Values. If the value of token s is wrong by e_s, what a head mixes for query t is wrong by sum over s of a_ts e_s. Of
independent errors the expected square is the sum over s of a_ts^2 |e_s|^2. With e_s = [x_s, 1] E for one wrong map E of
all tokens, that is, over all queries and heads, tr(E' V E) with

    V = sum over s of u_s [x_s, 1]' [x_s, 1],    u_s = sum over t, heads of a_ts^2.

Keys. A score of query t that is wrong by d_ts moves the layer's output by a_ts (v_s - o_t) W d_ts, to first order: o_t
is what the head mixed, W its output projection (see `chai_jax.compress.key_basis`). With d_ts = [x_t, 1] F [x_s, 1]'
for one wrong form F, and queries taken as independent of what they read, the expected square is tr(F' A F K), up to a
factor, with A = E[[x, 1]' [x, 1]], in which all queries count alike, and

    K = sum over s of w_s [x_s, 1]' [x_s, 1],    w_s = sum over t, heads of a_ts^2 |(v_s - o_t) W|^2.

V with the products of different tokens, the second moments of what heads mix, would be exact for calibration text. It
was no better on SmolLM2-135M, and it says nothing of what attention averages out there: latents of full rank lost
accuracy to rounding. All heads of a layer share A, V and K; moments are scaled to a sum of weights of 1.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from chai_jax.compress.merge import InputMoments, Moments, OutputMoments
from chai_jax.model.execution import Execution
from chai_jax.model.layers import project_to_heads
from chai_jax.model.layerwise import anonymous, seen_through, with_pairs
from chai_jax.model.params import Params
from chai_jax.model.quantized import dequantize
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec

BATCH = 8  # windows of one pass


def input_moments(
    config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Float[Array, "N W D"], mask: Any
) -> InputMoments:
    """Of the normed input of a layer that `x` enters; only real tokens count. Its heads must not be merged."""
    total = summed(partial(_input_moments, config, anonymous(layer), how), params, x, mask)
    # Where no score matters, as in a layer of zeros, all keys count alike.
    counted = {name: one if one[-1, -1] > 0 else total["query"] for name, one in total.items()}
    return InputMoments(**{name: Moments(one / one[-1, -1]) for name, one in counted.items()})


def output_moments(
    config: Architecture,
    layers: tuple[LayerSpec, LayerSpec],
    how: Execution,
    params: tuple[Params, Params],
    clusters: Sequence[int],
    x: Any,
    mask: Any,
) -> Iterator[OutputMoments]:
    """Moments of Z and Y for each of these clusters of a merged (`qkv`) layer.

    Z = P_c x is what the cluster's attention P_c makes of the normed input x. Y is the joint output of the cluster's
    heads in the dense layer, value biases included.

    Args:
        layers: the dense layer and the merged one; of the merged one only queries and keys are read.
        params: of both.
        x: [N, W, D], what enters the layer.
    """
    place = {heads[0]: at for at, heads in enumerate(layers[0].clusters)}
    # As arrays, so that layers with other clusters of the same number share a program.
    members = np.zeros((len(clusters), config.num_heads), np.float32)
    for row, cluster in zip(members, clusters, strict=True):
        row[[place[head] for head in layers[1].clusters[cluster]]] = 1
    chosen = jnp.asarray(members), jnp.asarray(clusters, jnp.int32)
    sums = partial(_output_moments, config, tuple(map(anonymous, layers)), how, *chosen)
    params = params[0], with_pairs(layers[1], params[1])
    total, width = summed(sums, params, x, mask), config.hidden_size
    for squares in total["pairs"]:
        pairs = squares / total["count"]
        z, y = pairs[0, 1 : width + 1], pairs[0, width + 1 :]
        zz, zy = pairs[1:, 1 : width + 1], pairs[1:, width + 1 :]
        yield OutputMoments(z, y, zz - np.outer(z, z), zy - np.outer(z, y))


def summed(function: Any, params: Any, x: Any, mask: Any) -> Any:
    """Add up `function(params, x, mask)` over batches, in float64."""
    total: Any = None
    for at in range(0, len(x), BATCH):
        windows, real = x[at : at + BATCH], np.asarray(mask[at : at + BATCH])
        # Windows are padded on the right to the longest of all: those of a task's prompts are mostly padding.
        length = min(real.shape[1], 1 << (int(real.sum(axis=1).max()) - 1).bit_length())
        room = (0, BATCH - len(real))
        part = jnp.pad(windows[:, :length], (room, (0, 0), (0, 0))), np.pad(real[:, :length], (room, (0, 0)))
        new = jax.device_get(function(params, *part))
        if total is None:
            total = jax.tree.map(lambda leaf: np.array(leaf, np.float64), new)
        else:  # in place: of a wide layer's clusters they are gigabytes
            total = jax.tree.map(lambda old, more: np.add(old, more, out=old), total, new)
    return total


@partial(jax.jit, static_argnums=(0, 1, 2))
def _input_moments(
    config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Array, mask: Array
) -> dict[str, Float[Array, "D1 D1"]]:
    """Sums over tokens of [x, 1]' [x, 1] as queries, keys and values count them."""
    _, seen = seen_through(config, layer, how, params, x, mask)
    rows = jnp.where(mask[..., None], jnp.pad(seen.x, ((0, 0), (0, 0), (0, 1)), constant_values=1.0), 0.0)
    value = project_to_heads(params["value"], seen.x, how.kernels)
    attention = jnp.where(mask[:, None, :, None], seen.probabilities, 0.0)
    cost = cost_of_scores(attention, value, seen.heads, params)
    by_key, by_value = (each.sum(axis=(1, 2))[..., None] * rows for each in (cost, attention**2))
    totals = {"query": rows, "key": by_key, "value": by_value}
    return {name: jnp.einsum("nwx,nwy->xy", rows, each, precision="highest") for name, each in totals.items()}


def cost_of_scores(
    attention: Float[Array, "B Q T S"], value: Float[Array, "B C S R"], mixed: Float[Array, "B Q T R"], params: Params
) -> Float[Array, "B Q T S"]:
    """a_ts^2 |(v_s - o_t) W|^2: what a small error of each score, squared, is multiplied by in the layer's output.

    Args:
        attention, mixed: a_ts and o_t of a dense layer's query heads; not all its queries t need be there.
        params: of the layer: W is the output projection.
    """
    batch, keys, _, rank = value.shape
    kernel = dequantize(params["output"]["kernel"]).astype(jnp.float32)
    kernel, out = kernel.reshape(keys, -1, rank, kernel.shape[-1]), mixed.reshape(batch, keys, -1, mixed.shape[2], rank)
    metric = jnp.einsum("cqrd,cqkd->cqrk", kernel, kernel, precision="highest")
    own, other = jnp.einsum("bcsr,cqrk->bcqsk", value, metric), jnp.einsum("bcqtr,cqrk->bcqtk", out, metric)
    distance = (
        jnp.einsum("bcqsk,bcsk->bcqs", own, value)[:, :, :, None]
        + jnp.einsum("bcqtk,bcqtk->bcqt", other, out)[..., None]
        - 2 * jnp.einsum("bcqtk,bcsk->bcqts", other, value)
    )
    return attention**2 * jnp.maximum(distance, 0.0).reshape(attention.shape)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _output_moments(
    config: Architecture,
    layers: tuple[LayerSpec, LayerSpec],
    how: Execution,
    members: Float[Array, "M H"],
    clusters: Int32[Array, " M"],
    params: tuple[Params, Params],
    x: Array,
    mask: Array,
) -> dict[str, Array]:
    """Second moments of [1, Z_c] with [1, Z_c, Y_c] for these clusters c."""
    both = zip(layers, params, strict=True)
    dense, merged = (seen_through(config, layer, how, tree, x, mask)[1] for layer, tree in both)
    kernel, real = dequantize(params[0]["output"]["kernel"]), mask[..., None]

    def moment(cluster: tuple[Array, Array]) -> Array:
        attention, weights = cluster
        offered = jnp.einsum("nts,nsd->ntd", attention, dense.x, precision="highest")
        wanted = jnp.einsum("nhtr,hrd,h->ntd", dense.heads, kernel, weights, precision="highest")
        known = jnp.where(real, jnp.concatenate([jnp.ones_like(x[..., :1]), offered], axis=-1), 0.0)
        return jnp.einsum("nwx,nwy->xy", known, jnp.concatenate([known, wanted], axis=-1), precision="highest")

    pairs = jax.lax.map(moment, (jnp.swapaxes(merged.probabilities, 0, 1)[clusters], members))
    return {"pairs": pairs, "count": mask.sum(dtype=jnp.float32)}
