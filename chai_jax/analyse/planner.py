"""From a probe to a plan: which heads share, which layers are spared, what is stored how."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich import box
from rich.table import Table

from chai_jax.analyse.cluster import assign, cluster_count, medoid, round_up
from chai_jax.analyse.probe import Probe, fingerprint
from chai_jax.analyse.sensitivity import critical, sensitivities, tiers
from chai_jax.compress.slice import cluster_order
from chai_jax.errors import InputError
from chai_jax.model.cache import BYTES, bytes_per_token, group_bytes_per_token
from chai_jax.model.model import Model
from chai_jax.model.params import OPTConfig
from chai_jax.progress import track
from chai_jax.spec import STORAGES, ClusterPlan, LayerPlan, LayerSpec, Plan, Spec, group_clusters

# tier: (storage of critical clusters, storage of redundant clusters, weights); the paper's section 3.3
TIER_FORMATS = {
    "high": ("bfloat16", "bfloat16", "loaded"),
    "medium": ("bfloat16", "int8", "bfloat16"),
    "low": ("int8", "int8", "int8"),
}


def plan(
    model: Model,
    probe: Probe,
    *,
    share: str = "qkv",
    layers: float = 0.5,
    clusters: str | int | float = "elbow",
    sensitivity: str = "kl",
    membership: str = "calibrated",
    seed: int = 0,
) -> Plan:
    """Decide which heads of a dense model share keys (and values), and in which formats its layers are stored.

    Args:
        probe: of this very model.
        share: `qk` (one query and key per cluster) or `qkv` (one value too).
        layers: fraction of the layers that are clustered, rounded up, those with the highest `redundancy` first; fewer
            where fewer have clusters to offer.
        clusters: per layer; `elbow` (a layer without a knee is left alone), a number, or a ratio below 1 of the heads.
        sensitivity: `kl`, `perturbation` or `attention` (see `sensitivities`). Every layer is perturbed by its own
            clusters, whether or not it is among those clustered in the end, so that the scores compare layers alone.
        membership: `calibrated`, or `prompt`: clusters are found anew for every prompt, so no cluster of a layer is
            known to be redundant and medium layers store all in bfloat16.
        seed: of K-Means.

    Raises:
        InputError: a model that is no dense one or not the one probed, or an argument that is none of the above.
    """
    Plan((), share, membership).check()
    if share not in ("qk", "qkv"):
        raise InputError(f"share is {share!r}; expected qk or qkv")
    if not 0 <= layers <= 1:
        raise InputError(f"layers is {layers}; expected a fraction of the layers from 0 to 1")
    if fingerprint(model) != probe.fingerprint:
        raise InputError("the probe is of another model; expected one of this model, as it is now: probe it again")
    correlations = track(list(probe.correlation), "Clustering the heads")
    candidates = [find_clusters(correlation, clusters, seed) for correlation in correlations]
    scores = sensitivities(model, probe, candidates, share, sensitivity)
    clustered = most_redundant(probe.correlation, candidates, layers)
    entries = []
    for index, tier in enumerate(tiers(scores)):
        chosen = candidates[index] if index in clustered else singletons(model.config.num_heads)
        entries.append(_layer_plan(chosen, tier, probe.outputs[index], membership))
    made = Plan(tuple(entries), share, membership, sensitivity=scores, method=sensitivity)
    made.check()
    return made


def plan_within(model: Model, probe: Probe, budget: float, **choices: Any) -> Plan:
    """The plan with the most clusters per layer, the same number in every layer, whose cache keeps to a budget.

    Which layers get which tier depends on the clusters, so counts are tried with the cheap `attention` scores and the
    one found is planned with the scores asked for. Where one cluster per layer is still too much, that plan is
    returned.

    Args:
        budget: cache bytes per token as a fraction of the dense bfloat16 cache.
        choices: `plan`'s keyword arguments, without `layers` and `clusters`.

    Raises:
        InputError: a budget that is not above 0; and what `plan` raises.
    """
    if not budget > 0:
        raise InputError(f"the cache budget is {budget}; expected a fraction of the dense bfloat16 cache, above 0")

    def with_count(count: int, **changes: Any) -> Plan:
        return plan(model, probe, layers=1.0, clusters=count, **{**choices, **changes})

    def fits(candidate: Plan) -> bool:
        return cache_fraction(candidate, model.config) <= budget

    heads = model.config.num_heads
    count = next((c for c in range(heads, 1, -1) if fits(with_count(c, sensitivity="attention"))), 1)
    found = with_count(count)
    while count > 1 and not fits(found):
        count -= 1
        found = with_count(count)
    return found


def cache_fraction(plan: Plan, config: OPTConfig) -> float:
    """Cache bytes of a plan's model over those of the dense bfloat16 cache, by formula."""
    dense = Spec.dense(config.num_layers, config.num_heads, config.head_dim, "bfloat16")
    return bytes_per_token(planned_spec(plan, config)) / bytes_per_token(dense)


def find_clusters(
    correlation: Float[np.ndarray, "H H"], clusters: str | int | float, seed: int = 0
) -> tuple[ClusterPlan, ...]:
    """One layer's clusters, each kept by its medoid; the features are the rows of the head correlations."""
    count = cluster_count(clusters, correlation, seed)
    return tuple(ClusterPlan(heads, medoid(correlation, heads)) for heads in assign(correlation, count, seed))


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


def most_redundant(
    correlation: Float[np.ndarray, "L H H"], candidates: Sequence[Sequence[ClusterPlan]], fraction: float
) -> set[int]:
    """The layers to cluster: of those with something to merge the most redundant, at most `fraction` of all layers."""
    scores = [redundancy(*layer) for layer in zip(correlation, candidates, strict=True)]
    ranked = sorted(range(len(scores)), key=lambda layer: -scores[layer])
    return {layer for layer in ranked[: round_up(fraction, len(scores))] if scores[layer] > -np.inf}


def _layer_plan(
    clusters: Sequence[ClusterPlan], tier: str, outputs: Float[np.ndarray, "H H"], membership: str
) -> LayerPlan:
    important, redundant, weights = TIER_FORMATS[tier]
    if membership == "prompt":
        redundant = important
    flags = critical(outputs, [one.heads for one in clusters])
    stored = (
        dataclasses.replace(one, critical=flag, storage=important if flag else redundant)
        for one, flag in zip(clusters, flags, strict=True)
    )
    return LayerPlan(tuple(stored), tier, weights)


def planned_spec(plan: Plan, config: OPTConfig) -> Spec:
    """The spec of the model that `cluster` and `quantize` make by this plan.

    Raises:
        InputError: the plan is for another shape of model.
    """
    plan.check_model(config.num_layers, config.num_heads)

    def layer(wanted: LayerPlan) -> LayerSpec:
        share = plan.share if wanted.clustered else "dense"
        storages = [one.storage for one in wanted.clusters]
        order = cluster_order(share, [one.heads for one in wanted.clusters], storages)
        clusters = tuple(wanted.clusters[at].heads for at in order)
        groups = group_clusters(share, clusters, [storages[at] for at in order])
        return LayerSpec(share, clusters, groups, config.head_dim, config.head_dim, wanted.weights)

    return Spec(tuple(layer(wanted) for wanted in plan.layers))


def explain(plan: Plan, config: OPTConfig | None = None) -> list[dict[str, Any]]:
    """A plan as plain rows, one per layer; with a model's configuration also bytes, and a last row of totals.

    `kv_bytes_per_token` and `dense_kv_bytes_per_token` (bfloat16) are by formula, for one sequence;
    `kv_reduction` is 1 - their ratio.
    """
    rows = []
    for index, layer in enumerate(plan.layers):
        storages = [one.storage for one in layer.clusters]
        rows.append(
            {
                "layer": index,
                "sensitivity": plan.sensitivity[index] if plan.sensitivity else None,
                "tier": layer.tier,
                "share": plan.share if layer.clustered else "dense",
                "heads": sum(len(one.heads) for one in layer.clusters),
                "clusters": len(layer.clusters),
                "critical": sum(one.critical for one in layer.clusters),
                "storage": {name: storages.count(name) for name in STORAGES if name in storages},
                "weights": layer.weights,
            }
        )
    if config is None:
        return rows
    spec = planned_spec(plan, config)
    per_layer = [sum(group_bytes_per_token(group, layer) for group in layer.groups) for layer in spec.layers]
    dense = 2 * config.hidden_size * BYTES["bfloat16"]
    for row, size in zip(rows, per_layer, strict=True):
        row |= _sizes(size, dense)
    return [*rows, {"layer": "total", **_sizes(sum(per_layer), dense * len(rows))}]


def _sizes(size: int, dense: int) -> dict[str, Any]:
    return {"kv_bytes_per_token": size, "dense_kv_bytes_per_token": dense, "kv_reduction": 1 - size / dense}


def explain_table(plan: Plan, config: OPTConfig | None = None) -> Table:
    """`explain` as a table that fits 80 columns."""
    rows = explain(plan, config)
    used = [name for name in STORAGES if any(name in row.get("storage", ()) for row in rows)]
    title = f"share {plan.share}, {plan.merge}, {plan.membership}; scores: {plan.method}"
    caption = f"{', '.join(used)}: how many clusters cache keys and values so"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = ["layer", "score", "tier", "share", "C/H", *used, "weights"]
    for name in names + (["B/token", "saved"] if config else []):
        table.add_column(name, justify="left" if name in ("tier", "share", "weights") else "right")
    for row in rows:
        cells = [""] * (len(names) - 1)
        if "tier" in row:
            score = "" if row["sensitivity"] is None else f"{row['sensitivity']:.2g}"
            counts = (str(row["storage"].get(name, 0)) for name in used)
            cells = [score, row["tier"], row["share"], f"{row['clusters']}/{row['heads']}", *counts, row["weights"]]
        if config:
            cells += [f"{row['kv_bytes_per_token']:,}", f"{row['kv_reduction']:.1%}"]
        table.add_row(str(row["layer"]), *cells)
    return table
