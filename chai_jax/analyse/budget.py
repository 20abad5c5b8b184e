"""The planner: which layers share what, at which rank and in which format, so that a byte budget costs least.

The cost of every change to every layer is measured (`chai_jax.analyse.costs`), summed to predict that of any mixture,
and the mixture with the least predicted cost within the budget is chosen (`chai_jax.analyse.allocate`): first what is
cached, then the formats of the weights.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chai_jax.analyse.allocate import Choice, allocate
from chai_jax.analyse.costs import CostMeter, FindClusters, LayerCosts, Sizes, interpolate, latent, measure_costs
from chai_jax.analyse.planner import check_probe, find_clusters, mark_critical, singletons
from chai_jax.analyse.probe import Probe
from chai_jax.analyse.sensitivity import tiers
from chai_jax.compress.calibration import held_out, joined
from chai_jax.compress.quantize import store_weights
from chai_jax.errors import InputError
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.layerwise import Text, rest_of
from chai_jax.model.model import Model
from chai_jax.model.params import Declared, Params, declare
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import BASIS, FEW
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.planned import planned_layer
from chai_jax.plans.spec import Spec

RANK_STEPS = tuple(2 ** (-step / 2) for step in range(1, 13))  # 0.7, 1/2, 0.35, 1/4, ... 1/64
REFERENCE_CLUSTERS, REFERENCE_RANK = 1 / 2, 1 / 8  # the changes whose cost is a layer's sensitivity


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a plan may cost and choose from.

    Attributes:
        cache: bytes of the cache per token, as a fraction of the dense bfloat16 cache.
        model: bytes of the weights, as a fraction of the dense model in bfloat16; None: weights stay as loaded.
        shares: some of `qk`, `qkv`, `kv`; none: no heads are merged.
        storages: cache formats, some of `STORAGES`.
        pinned: layers that stay as they are, with a bfloat16 cache.
        ranks: whether the keys and values of `qkv` clusters may have fewer dimensions than a head.
        tokens: about how many calibration tokens to measure on.

    Raises:
        InputError: a budget that is not above 0, or nothing to choose from.
    """

    cache: float
    model: float | None = None
    shares: tuple[str, ...] = ("qkv", "kv")
    storages: tuple[str, ...] = ("bfloat16", "int8")
    pinned: tuple[int, ...] = ()
    ranks: bool = True
    tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("cache", "model"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(
                    f"the {name} budget is {value}; expected a fraction of the dense bfloat16 one, above 0"
                )
        if not self.storages:
            raise InputError("the planner has nothing to choose from; expected a storage at least")

    def check_layers(self, layers: int) -> None:
        """Raise InputError where a layer is pinned that a model of so many layers has not."""
        missing = [index for index in self.pinned if not 0 <= index < layers]
        if missing:
            raise InputError(f"layer {missing[0]} is pinned; expected layers from 0 to {layers - 1}")


def plan_within(
    model: Model,
    probe: Probe,
    budget: Budget,
    *,
    score_merge: str = "low_rank",
    value_merge: str = "low_rank",
    seed: int = 0,
    file: Path | None = None,
    scales: Sequence[float] = (),
) -> Plan:
    """The plan with the least predicted KL whose cache (and weights) keep to a budget; `Plan.predicted` is that KL.

    Where even the smallest choices are too large, they are what is returned: compare `cache_fraction` with the budget.

    Args:
        probe: of this very model.
        seed: of K-Means.
        file: measurements are kept here after every layer, and read back by the next attempt.
        scales: what the costs of each layer are multiplied by; none: 1 (see `chai_jax.analyse.whole_plan`).

    Raises:
        InputError: a model that is no dense one or not the one probed, a pinned layer that it lacks, a file of other
            measurements.
    """
    config, weights = model.config, ("bfloat16", "int8") if budget.model else ()
    base = Plan((), (*budget.shares, "qkv")[0], score_merge=score_merge, value_merge=value_merge, method="kl")
    base.check()
    check_probe(model, probe)
    budget.check_layers(config.num_layers)

    @cache
    def find(index: int, count: int) -> tuple[ClusterPlan, ...]:
        return find_clusters(probe.correlation[index], count, seed)

    fit, text = parts(config, probe, budget)
    storages = [name for name in budget.storages if name != "bfloat16"]
    measured = list(
        measure_costs(
            partial(CostMeter, model, fit, text, base, find),
            budget.shares,
            ["bfloat16", *storages],
            weights,
            config.num_layers,
            file,
            _key(probe, text, base, seed),
        )
    )
    choices = [
        [
            dataclasses.replace(one, cost=scale * one.cost)
            for one in (_pinned(config) if index in budget.pinned else _choices(config, costs, budget, index, find))
        ]
        for index, (costs, scale) in enumerate(zip(measured, scales or [1.0] * len(measured), strict=True))
    ]
    dense = bytes_per_token(Spec.of(config, "bfloat16"))
    chosen = allocate(choices, budget.cache * dense)
    layers, predicted = [one.what for one in chosen], sum(one.cost for one in chosen)
    if budget.model is not None:
        layers, more = _weights(model, layers, measured, budget)
        predicted += more
    scores = [_sensitivity(config, costs) for costs in measured]
    layers = [
        dataclasses.replace(layer, tier=tier, clusters=mark_critical(layer.clusters, probe.outputs[index]))
        for index, (layer, tier) in enumerate(zip(layers, tiers(scores), strict=True))
    ]
    made = dataclasses.replace(base, layers=tuple(layers), sensitivity=tuple(scores), predicted=predicted)
    made.check()
    made.check_model(config)
    return made


def parts(config: Architecture, text: Text, budget: Budget) -> tuple[Text, tuple[np.ndarray, np.ndarray]]:
    """What changes are fitted to, and the tokens and mask that their damage is measured on.

    Raises:
        InputError: the text is too short for the formats to choose from.
    """
    fit, rest = held_out(text, budget.tokens)
    if {*FEW, *BASIS} & set(budget.storages):
        return fit, joined(rest, budget.tokens, config.max_positions)
    return fit, (rest.tokens, rest.mask)


def _key(probe: Probe, text: tuple[np.ndarray, np.ndarray], plan: Plan, seed: int) -> str:
    """What measured costs depend on, beside the choices themselves."""
    digest = hashlib.sha256(f"{probe.fingerprint} {plan} {seed}".encode())
    for array in (probe.tokens, probe.mask, *text):
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _choices(
    config: Architecture, costs: LayerCosts, budget: Budget, index: int, find: FindClusters
) -> Iterator[Choice]:
    """All that a layer could become: every number of clusters and pair of their ranks, every pair of latent ranks, in
    every format."""
    heads = config.kv_heads
    shapes: list[tuple[LayerPlan, float]] = [(LayerPlan(singletons(heads)), 0.0)]
    for share, sizes in costs.clusters.items():
        for count in range(min(sizes), heads + 1):
            clusters, cost = find(index, count), interpolate(sizes, count)
            for key, value, more in _ranks(
                config, costs.ranks if budget.ranks and share == "qkv" else {}, config.head_dim
            ):
                if count < heads or key or value:
                    shapes.append((LayerPlan(clusters, share=share, key_rank=key, value_rank=value), cost + more))
    for key, value, cost in _ranks(config, costs.latent, config.kv_width):
        if key and value:
            shapes.append((latent(heads, key, value), cost))
    formats = [(storage, (), costs.cache[storage]) for storage in budget.storages if storage not in BASIS]
    bases = [] if costs.basis is None else list(costs.basis.choices())
    for layer, cost in shapes:
        for storage, channels, more in formats + ([] if layer.merged else bases):
            clusters = tuple(dataclasses.replace(one, storage=storage) for one in layer.clusters)
            what = dataclasses.replace(layer, clusters=clusters, channels=channels)
            yield Choice(_cache_bytes(what, config), cost + more, what)


def _ranks(
    config: Architecture, measured: dict[str, Sizes], size: int
) -> Iterator[tuple[int | None, int | None, float]]:
    """(rank of keys, of values, what that costs) for every pair of ranks below `size`; None: left whole."""
    options: list[dict[int | None, float]] = []
    for name in ("key", "value"):
        possible = {max(1, round(step * size)) for step in RANK_STEPS if name in measured}
        ranks = sorted(({config.even(rank) for rank in possible} if name == "key" else possible) - {size})
        options.append({None: 0.0} | {rank: interpolate(measured[name], rank) for rank in ranks})
    for (key, one), (value, other) in itertools.product(*(option.items() for option in options)):
        yield key, value, one + other


def _pinned(config: Architecture) -> Iterator[Choice]:
    """The one choice of a layer that stays as it is."""
    layer = LayerPlan(singletons(config.kv_heads))
    yield Choice(_cache_bytes(layer, config), 0.0, layer)


def _cache_bytes(layer: LayerPlan, config: Architecture) -> int | float:
    return bytes_per_token(Spec((planned_layer(layer, layer.share or "dense", config),)))


def _weights(
    model: Model, layers: Sequence[LayerPlan], measured: Sequence[LayerCosts], budget: Budget
) -> tuple[list[LayerPlan], float]:
    """The layers with weight formats that keep the model to its budget, and what these are predicted to cost."""
    assert budget.model is not None
    config = model.config
    outside = sum(leaf.nbytes for leaf in jax.tree.leaves(rest_of(model.params)))
    dense = 2 * sum(leaf.size for leaf in jax.tree.leaves(model.params))
    choices = []
    for index, (layer, costs) in enumerate(zip(layers, measured, strict=True)):
        spec = Spec((planned_layer(layer, layer.share or "dense", config),))
        declared = declare(config, spec)["layers"]["0"]
        loaded = model.params["layers"][str(index)]["up"]["kernel"].dtype
        formats = {"loaded": 0.0} | ({} if index in budget.pinned else costs.weights)
        choices.append(
            [
                Choice(_weight_bytes(declared, name, loaded), cost, dataclasses.replace(layer, weights=name))
                for name, cost in formats.items()
            ]
        )
    chosen = allocate(choices, budget.model * dense - outside)
    return [one.what for one in chosen], sum(one.cost for one in chosen)


def _weight_bytes(declared: Params, weights: str, loaded: Any) -> int:
    """Bytes of a layer of these shapes, loaded in this dtype, once its kernels are stored as `weights`."""

    def shape(leaf: Declared) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, loaded)

    shapes = jax.tree.map(shape, declared, is_leaf=lambda leaf: isinstance(leaf, Declared))
    stored = jax.eval_shape(lambda params: store_weights(params, weights), shapes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))


def _sensitivity(config: Architecture, costs: LayerCosts) -> float:
    """A layer's score: the cost of half its clusters (or of a latent of an eighth of its width; or, where no heads are
    merged, of the worst format), in nats per token."""
    for sizes in costs.clusters.values():
        return interpolate(sizes, max(1, round(REFERENCE_CLUSTERS * config.kv_heads)))
    if not costs.latent:
        bases = costs.basis.choices() if costs.basis else ()
        return max(*costs.cache.values(), 0.0, *(cost for _, _, cost in bases))
    rank = max(1, round(REFERENCE_RANK * config.kv_width))
    return sum(interpolate(costs.latent[name], rank) for name in ("key", "value"))
