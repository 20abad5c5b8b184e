"""The rows of the study: every way to make a cache smaller, as a plan."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from chai_jax.analyse.planner import find_clusters, plan, singletons
from chai_jax.analyse.probe import Probe
from chai_jax.model.model import Model
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan

RATIOS = (0.75, 0.5, 0.25)  # of the heads
RANKS = (0.375, 0.25, 0.125, 0.0625)  # of the width, which is also the fraction of the cache
BUDGETS = (0.5, 0.45, 0.35, 0.25, 0.2, 0.15, 0.12, 0.1, 0.06, 0.04, 0.03)
LOW_RANK = {"score_merge": "low_rank", "value_merge": "low_rank"}
FIT = {"score_merge": "low_rank", "value_merge": "fit"}

# What the planner may choose from: the paper's own layer, with int4 as one more tier, with fewer dimensions; and all.
CLUSTERS = {"shares": ("qkv",), "storages": ("bfloat16", "int8"), "ranks": False, "value_merge": "fit"}
FORMATS = ("bfloat16", "int8", "int4")
EVERYTHING = {"shares": ("qkv", "kv"), "storages": FORMATS, "value_merge": "low_rank"}
CHOICES = {
    "clusters": CLUSTERS,
    "clusters4": CLUSTERS | {"storages": FORMATS},
    "ranks": CLUSTERS | {"ranks": True},
    "everything": EVERYTHING,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row: its name, the family it is drawn with, and what makes its plan (None: the dense model)."""

    name: str
    family: str
    make: Callable[[], Plan | None]


def variants(model: Model, probe: Callable[[], Probe], within: Callable[..., Plan], seed: int) -> Iterator[Variant]:
    """All rows, cheapest to make first.

    Args:
        probe: of the model; called by rows that need it.
        within: the planner, by `within(budget, **choices)`.
        seed: of K-Means and of random clusters.
    """
    config = model.config
    heads, layers = config.num_heads, config.num_layers

    def of(each: Sequence[LayerPlan], storage: str = "bfloat16", share: str = "qkv", **fields: str) -> Plan:
        return Plan(tuple(stored_as(one, storage) for one in each), share, **fields)  # type: ignore[arg-type]

    def unclustered(storage: str) -> Plan:
        return of([LayerPlan(singletons(heads))] * layers, storage)

    def clustered(share: str, ratio: float | str, **fields: str) -> Plan:
        return of([LayerPlan(find_clusters(one, ratio, seed)) for one in probe().correlation], share=share, **fields)

    def drawn(ratio: float) -> Plan:
        random = np.random.default_rng((seed, 0))
        return of(
            [LayerPlan(at_random(heads, max(1, round(ratio * heads)), random)) for _ in range(layers)], share="qk"
        )

    def latent(part: float) -> Plan:
        rank, everyone = max(1, round(part * config.hidden_size)), ClusterPlan(tuple(range(heads)), 0)
        return of([LayerPlan((everyone,), key_rank=rank, value_rank=rank)] * layers, share="kv")

    yield Variant("dense", "dense", lambda: None)
    for storage in ("int8", "int4"):
        yield Variant(storage, storage, partial(unclustered, storage))
    for ratio in RATIOS:
        yield Variant(f"chai-{ratio}", "CHAI, calibrated", partial(clustered, "qk", ratio))
        prompt = partial(clustered, "qk", ratio, membership="prompt")
        yield Variant(f"chai-prompt-{ratio}", "CHAI, per prompt", prompt)
        yield Variant(f"chai-random-{ratio}", "CHAI, random clusters", partial(drawn, ratio))
        yield Variant(f"qkv-representative-{ratio}", "qkv, representative", partial(clustered, "qkv", ratio))
        yield Variant(f"qkv-low_rank-{ratio}", "qkv, low rank", partial(clustered, "qkv", ratio, **LOW_RANK))
        yield Variant(f"qkv-fit-{ratio}", "qkv, fit", partial(clustered, "qkv", ratio, **FIT))
    for part in RANKS:
        yield Variant(f"latent-{part}", "kv latent", partial(latent, part))
    yield Variant("elbow", "elbow", partial(clustered, "qkv", "elbow", **FIT))
    yield Variant("tiers", "tiers", lambda: plan(model, probe(), layers=1.0, seed=seed, **FIT))
    for name, choices in CHOICES.items():
        for budget in BUDGETS:
            yield Variant(f"{name}-{budget}", f"planner, {name}", partial(within, budget, **choices))


def at_random(heads: int, count: int, random: np.random.Generator) -> tuple[ClusterPlan, ...]:
    """A partition of the heads into `count` clusters, none empty, each kept by one of its heads."""
    shuffled = random.permutation(heads)
    labels = np.concatenate([np.arange(count), random.integers(0, count, heads - count)])
    parts = [shuffled[labels == label].tolist() for label in range(count)]
    return tuple(ClusterPlan(tuple(sorted(part)), part[0]) for part in parts)


def stored_as(layer: LayerPlan, storage: str) -> LayerPlan:
    """The layer with all its clusters in one format."""
    clusters = tuple(dataclasses.replace(one, storage=storage) for one in layer.clusters)
    return dataclasses.replace(layer, clusters=clusters)
