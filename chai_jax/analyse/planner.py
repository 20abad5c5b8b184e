"""From a probe to a plan: which heads share, which layers are spared, what is stored how."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from chai_jax.analyse.cluster import balanced_clusters, cluster_count, clusters_of, medoid
from chai_jax.analyse.probe import Probe, fingerprint
from chai_jax.analyse.queries import of_kept, query_clusters
from chai_jax.analyse.sensitivity import critical, sensitivities, tiers
from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan, round_up

# tier: (storage of critical clusters, storage of redundant clusters, weights); the paper's section 3.3
TIER_FORMATS = {
    "high": ("bfloat16", "bfloat16", "loaded"),
    "medium": ("bfloat16", "int8", "bfloat16"),
    "low": ("int8", "int8", "int8"),
}
FIRST = ("redundant", "insensitive")  # which layers are clustered first, where not all are


def plan(
    model: Model,
    probe: Probe,
    *,
    share: str = "qkv",
    layers: float = 0.5,
    first: str = "redundant",
    clusters: str | int | float = "elbow",
    rank: float = 0.25,
    score_merge: str = "representative",
    value_merge: str = "representative",
    sensitivity: str = "kl",
    membership: str = "calibrated",
    warmup_tokens: int = 5,
    queries: int | None = None,
    seed: int = 0,
) -> Plan:
    """Decide which heads of a dense model share keys (and values), and in which formats its layers are stored.

    Args:
        probe: of this very model.
        share: `qk` (one query and key per cluster), `qkv` (one value too) or `kv` (one latent key and value for all
            heads of a layer).
        layers: fraction of the layers that are clustered, rounded up; fewer where fewer have clusters to offer.
        first: which of them: `redundant` (highest `redundancy`) or `insensitive` (lowest score).
        clusters: per layer; `elbow` (one where all heads are alike; a layer without a knee is left alone), a number, a
            ratio below 1 of the heads, or `correlation:0.9` (as few as leave every head so correlated with its
            representative). Not for `kv`.
        rank: of a `kv` latent, as a fraction of all keys' (or values') dimensions, at most the width.
        score_merge, value_merge: see `Plan`.
        sensitivity: `kl`, `perturbation` or `attention` (see `sensitivities`). Every layer is perturbed by its own
            clusters, whether or not it is among those clustered in the end, so that the scores compare layers alone.
        membership: `calibrated`, or `prompt`: clusters are found anew for every prompt, so no cluster of a layer is
            known to be redundant and medium layers store all in bfloat16; the clusters of the plan are those of
            prompts shorter than the warm-up.
        warmup_tokens: on which a prompt's clusters are found.
        queries: that each key head keeps in every layer, of a model with grouped queries; heads are then compared by
            these alone. None: all.
        seed: of K-Means.

    Raises:
        InputError: a model that is no dense one or not the one probed, or an argument that is none of the above.
    """
    base = Plan((), share, membership, score_merge, value_merge, warmup_tokens, method=sensitivity)
    base.check()
    if not 0 <= layers <= 1:
        raise InputError(f"layers is {layers}; expected a fraction of the layers from 0 to 1")
    if first not in FIRST:
        raise InputError(f"first is {first!r}; expected one of {', '.join(FIRST)}")
    if not 0 < rank <= 1:
        raise InputError(f"rank is {rank}; expected a fraction of the width above 0, up to 1")
    check_probe(model, probe)
    fewer = query_clusters(probe, queries, seed)
    probe = of_kept(probe, fewer)
    latent = round_up(rank, model.config.kv_width) if share == "kv" else None
    keys = latent and model.config.even(latent)
    candidates = [
        LayerPlan(
            find_clusters(correlation, 1 if latent else clusters, seed),
            key_rank=keys,
            value_rank=latent,
            query_clusters=own,
        )
        for correlation, own in zip(track(list(probe.correlation), "Clustering the heads"), fewer, strict=True)
    ]
    scores = sensitivities(model, probe, candidates, base, sensitivity)
    chosen = _clustered(probe, candidates, layers, scores if first == "insensitive" else None)
    entries = []
    for index, tier in enumerate(tiers(scores)):
        alone = LayerPlan(singletons(model.config.kv_heads), query_clusters=fewer[index])
        layer = candidates[index] if index in chosen else alone
        entries.append(_with_formats(layer, tier, probe.outputs[index], membership))
    made = dataclasses.replace(base, layers=tuple(entries), sensitivity=scores)
    made.check()
    return made


def grouped_plan(model: Model, probe: Probe, kv_heads: int, seed: int = 0, queries: int | None = None) -> Plan:
    """A plan by which every layer has so many key and value heads, each read by as many queries as any other.

    Heads that attend alike are grouped, and each group reads one key and one value of an ordinary head's dimensions,
    the best by `chai_jax.compress.merge.latent_scores` or `rotary_latent_scores` and `latent_values`. The result is
    an ordinary model with grouped queries (Ainslie et al. 2023, arXiv 2305.13245), where its family has such.

    Args:
        kv_heads: a divisor of the model's.
        queries: that each of the model's key heads keeps; None: all.
    """
    check_probe(model, probe)
    fewer = query_clusters(probe, queries, seed)
    layers = []
    for correlation, own in zip(of_kept(probe, fewer).correlation, fewer, strict=True):
        members = balanced_clusters(correlation, kv_heads, seed)
        clusters = tuple(ClusterPlan(heads, medoid(correlation, heads)) for heads in members)
        layers.append(LayerPlan(clusters, query_clusters=own))
    plan = Plan(tuple(layers), "kv")
    plan.check()
    return plan


def check_probe(model: Model, probe: Probe) -> None:
    """Raise InputError unless the probe is of this very model."""
    if fingerprint(model) != probe.fingerprint:
        raise InputError("the probe is of another model; expected one of this model, as it is now: probe it again")


def find_clusters(
    correlation: Float[np.ndarray, "H H"], clusters: str | int | float, seed: int = 0
) -> tuple[ClusterPlan, ...]:
    """One layer's clusters, each kept by its medoid; the features are the rows of the head correlations."""
    count = cluster_count(clusters, correlation, seed)
    return tuple(ClusterPlan(heads, medoid(correlation, heads)) for heads in clusters_of(correlation, count, seed))


def singletons(heads: int) -> tuple[ClusterPlan, ...]:
    """The clusters of a layer that is left alone."""
    return tuple(ClusterPlan((head,), head) for head in range(heads))


def redundancy(correlation: Float[np.ndarray, "H H"], clusters: Sequence[ClusterPlan]) -> float:
    """Mean correlation of the heads that are merged away with those that stand in for them; -inf where none is.

    It judges the very replacements a plan would make, so layers of different numbers of clusters compare; the share of
    inertia explained would not: it rates a layer of equal heads by its noise.
    """
    pairs = [(head, one.keep) for one in clusters for head in one.heads if head != one.keep]
    return float(np.mean([correlation[pair] for pair in pairs])) if pairs else -np.inf


def _clustered(
    probe: Probe, candidates: Sequence[LayerPlan], fraction: float, scores: Sequence[float] | None
) -> set[int]:
    """The layers to cluster, at most `fraction` of all: of those with something to merge the least sensitive by
    `scores`, or, without scores, the most redundant."""
    redundancies = [
        redundancy(*layer) for layer in zip(probe.correlation, (one.clusters for one in candidates), strict=True)
    ]
    able = [index for index, found in enumerate(redundancies) if found > -np.inf]
    ranked = sorted(able, key=lambda index: -redundancies[index] if scores is None else scores[index])
    return set(ranked[: round_up(fraction, len(candidates))])


def mark_critical(clusters: Sequence[ClusterPlan], outputs: Float[np.ndarray, "H H"]) -> tuple[ClusterPlan, ...]:
    """The clusters, each marked critical or redundant (see `chai_jax.analyse.sensitivity.critical`)."""
    flags = critical(outputs, [one.heads for one in clusters])
    return tuple(dataclasses.replace(one, critical=flag) for one, flag in zip(clusters, flags, strict=True))


def _with_formats(layer: LayerPlan, tier: str, outputs: Float[np.ndarray, "H H"], membership: str) -> LayerPlan:
    important, redundant, weights = TIER_FORMATS[tier]
    if membership == "prompt":
        redundant = important
    marked = mark_critical(layer.clusters, outputs)
    clusters = tuple(dataclasses.replace(one, storage=important if one.critical else redundant) for one in marked)
    return dataclasses.replace(layer, clusters=clusters, tier=tier, weights=weights)
