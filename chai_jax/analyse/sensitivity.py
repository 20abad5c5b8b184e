"""How much each layer bears: scores, tiers, and the clusters that matter most.

Higher scores are more sensitive. `attention` is the paper's section 3.3; `perturbation` (rise of the loss) is its
introduction; `kl` (divergence of the next-token distribution) sees what the loss hides: predictions that changed but
happen to fit the text as well. Perturbed is one layer at a time, merged by its own clusters and then quantized as the
low tier is: cache and weights in int8. All else stays as loaded, with a float32 cache.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from chai_jax.analyse.damage import Damage
from chai_jax.analyse.probe import Probe
from chai_jax.compress.calibration import evenly_spaced
from chai_jax.compress.cluster import Stream, merged_layer
from chai_jax.compress.quantize import layer_with_storage, store_weights
from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.plan import METHODS, LayerPlan, Plan, round_up
from chai_jax.plans.spec import LayerSpec

HIGH, LOW = 0.2, 0.3  # shares of the layers in the high (rounded up) and low (rounded down) tier


def sensitivities(
    model: Model, probe: Probe, layers: Sequence[LayerPlan], plan: Plan, method: str = "kl", tokens: int = 2048
) -> tuple[float, ...]:
    """One score per layer of a dense model, on the probe's calibration text.

    Args:
        layers: what each layer is merged to when its turn comes (singletons: it is only quantized).
        plan: the share and merges by which; its own layers are not read.
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
    damage = Damage(model, *evenly_spaced(probe, tokens))
    stream = Stream(damage.model, probe) if dataclasses.replace(plan, layers=tuple(layers)).needs_text else None
    scores = []
    for index, wanted in enumerate(track(layers, "Perturbing the layers")):
        scores.append(damage.of(index, *perturbed(damage.model, index, wanted, plan, stream)))
        if stream is not None:
            stream.advance()
    return tuple(divergence if method == "kl" else rise for divergence, rise in scores)


def perturbed(
    model: Model, index: int, wanted: LayerPlan, plan: Plan, stream: Stream | None = None
) -> tuple[LayerSpec, Params]:
    """Layer `index` merged as `wanted` and stored as the low tier is; `stream` where the merge needs text."""
    spec, params = model.spec.layers[index], model.params["layers"][str(index)]
    if wanted.merged or wanted.query_clusters:
        spec, params = merged_layer(model, index, wanted, plan, stream)
    return layer_with_storage(spec, "int8"), store_weights(params, "int8")


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
