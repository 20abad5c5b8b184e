"""How much each layer bears: scores, tiers, and the clusters that matter most.

Higher scores are more sensitive. `attention` is the paper's section 3.3; `perturbation` (rise of the loss) is its
introduction; `kl` (divergence of the next-token distribution) sees what the loss hides: predictions that changed but
happen to fit the text as well. Perturbed is one layer at a time, merged by its own clusters and then quantized as the
low tier is: cache and weights in int8. All else stays as loaded, with a float32 cache.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.analyse.cluster import round_up
from chai_jax.analyse.probe import Probe
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.compress.slice import cluster
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.opt import OPT, Block, unembed, visible
from chai_jax.model.params import OPTConfig, Params
from chai_jax.progress import track
from chai_jax.score import HEAD_ROWS
from chai_jax.spec import ClusterPlan, LayerPlan, LayerSpec, Plan, Spec

METHODS = ("attention", "perturbation", "kl")
HIGH, LOW = 0.2, 0.3  # shares of the layers in the high (rounded up) and low (rounded down) tier


def sensitivities(
    model: Model,
    probe: Probe,
    clusters: Sequence[tuple[ClusterPlan, ...]],
    share: str,
    method: str = "kl",
    tokens: int = 2048,
) -> tuple[float, ...]:
    """One score per layer of a dense model, on the probe's calibration text.

    Args:
        clusters: what each layer is merged to when its turn comes (singletons: it is only quantized).
        share: `qk` or `qkv`.
        method: `attention`: mean absolute pre-softmax score. `perturbation`: rise of the loss in nats per token.
            `kl`: mean KL(dense || perturbed) in nats per token.
        tokens: about how many to score, in windows spread evenly over the probe's; `attention` has seen all.

    Raises:
        InputError: an unknown method.
    """
    if method not in METHODS:
        raise InputError(f"sensitivity {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if method == "attention":
        return tuple(probe.scores.tolist())
    divergence, rise = damage(model, *_spread(probe, tokens), clusters, share)
    return tuple((divergence if method == "kl" else rise).tolist())


def damage(
    model: Model,
    tokens: Int32[np.ndarray, "N W"],
    mask: Bool[np.ndarray, "N W"],
    clusters: Sequence[tuple[ClusterPlan, ...]],
    share: str,
) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"]]:
    """What perturbing each layer alone does to predictions: mean KL, and rise of the loss, in nats per token.

    Layers before the perturbed one give what the dense model gives, so its hidden states are carried along and only the
    rest is computed: half the work, and one small program per layer to compile instead of one whole model.
    """
    config, dense = model.config, with_storage(model, "float32")

    def through(source: Model, index: int, x: Array) -> Array:
        return _layer(config, source.spec.layers[index], source.params["layers"][str(index)], x, mask)

    rest = {name: leaf for name, leaf in dense.params.items() if name != "layers"}
    before = _embed(config, rest, tokens, mask)
    truth = before
    for index in range(config.num_layers):
        truth = through(dense, index, truth)
    # Padding stands on the right: a position predicts the next token where there is one.
    predicts = np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    targets = tokens[:, 1:][mask[:, 1:]]
    scores = []
    for index in track(range(config.num_layers), "Perturbing the layers"):
        x = through(perturb(dense, index, clusters[index], share), index, before)
        for later in range(index + 1, config.num_layers):
            x = through(dense, later, x)
        scores.append(jax.device_get(_compare(config, rest, targets, truth[predicts], x[predicts])))
        before = through(dense, index, before)
    divergence, rise = np.asarray(scores, np.float64).T
    return divergence, rise


def perturb(model: Model, index: int, clusters: Sequence[ClusterPlan], share: str) -> Model:
    """The model with layer `index` alone merged to `clusters` and stored as the low tier is."""
    whole = LayerPlan(tuple(ClusterPlan((head,), head, storage="float32") for head in range(model.config.num_heads)))
    low = LayerPlan(tuple(dataclasses.replace(one, storage="int8") for one in clusters), tier="low", weights="int8")
    layers = [whole] * model.config.num_layers
    layers[index] = low
    plan = Plan(tuple(layers), share)
    return quantize(cluster(model, plan), plan)


@partial(jax.jit, static_argnums=0)
def _embed(config: OPTConfig, params: Params, tokens: Array, mask: Array) -> Float[Array, "N W D"]:
    return OPT(config, Spec(()), params).embed(tokens, visible(mask, None)[0], jnp.float32)


@partial(jax.jit, static_argnums=(0, 1))
def _layer(config: OPTConfig, layer: LayerSpec, params: Params, x: Array, mask: Array) -> Float[Array, "N W D"]:
    _, allowed, start, _ = visible(mask, None)
    return Block(config, layer, params)(x, allowed, None, start)[0]


@partial(jax.jit, static_argnums=0)
def _compare(
    config: OPTConfig,
    params: Params,
    targets: Int32[Array, " M"],
    truth: Float[Array, "M D"],
    x: Float[Array, "M D"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean KL(truth || x) and mean rise of the loss over predictions, from hidden states after the last layer."""
    norm = OPT(config, Spec(()), params).final_norm
    if norm is not None:
        truth, x = norm(truth[None])[0], norm(x[None])[0]

    def prediction(entry: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        target, *hidden = entry
        right, wrong = (jax.nn.log_softmax(unembed(config, params, row)) for row in hidden)
        return jnp.sum(jnp.exp(right) * (right - wrong)), right[target] - wrong[target]

    # Some rows at a time: the logits [M, V] of both models would be the largest arrays by far.
    divergence, rise = jax.lax.map(prediction, (targets, truth, x), batch_size=HEAD_ROWS)
    return divergence.mean(), rise.mean()


def _spread(probe: Probe, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced windows of the calibration text that hold about `tokens` tokens."""
    windows = len(probe.tokens)
    count = min(windows, -(-tokens * windows // probe.rows))
    rows = np.arange(count) * windows // count
    return probe.tokens[rows], probe.mask[rows]


def tiers(scores: Sequence[float]) -> tuple[str, ...]:
    """high: the fifth (rounded up) of the layers that is most sensitive; low: the three tenths (rounded down) that are
    least; medium: the rest. Of layers with equal scores the earlier counts as more sensitive."""
    layers = len(scores)
    high, low = round_up(HIGH, layers), int(round(LOW * layers, 9))
    ranked = sorted(range(layers), key=lambda layer: -scores[layer])
    tier_of = {layer: "high" if rank < high else "medium" for rank, layer in enumerate(ranked[: layers - low])}
    return tuple(tier_of.get(layer, "low") for layer in range(layers))


def critical(outputs: Float[np.ndarray, "H H"], clusters: Sequence[tuple[int, ...]]) -> tuple[bool, ...]:
    """Which clusters form the smallest set that makes up half of a layer's output norm.

    A cluster's share is the squared norm of its heads' joint output (`Probe.outputs`). The set is never empty, so a
    lone cluster is critical; of equal clusters the first goes in first.
    """
    norms = np.asarray([outputs[np.ix_(heads, heads)].sum() for heads in clusters])
    ranked = np.argsort(-norms, kind="stable")
    reached = np.cumsum(norms[ranked]) >= norms.sum() / 2
    inside = ranked[: int(np.argmax(reached)) + 1]
    return tuple(at in inside for at in range(len(clusters)))
