"""From a plan to the spec of the model that it makes: no weights are needed."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

from chai_jax.errors import InputError
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import STORAGES
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.spec import LayerSpec, Spec, group_clusters


def planned_spec(plan: Plan, config: Architecture) -> Spec:
    """The spec of the model that `cluster` and `quantize` make by this plan.

    Raises:
        InputError: the plan is for another shape of model.
    """
    plan.check_model(config)

    def layer(wanted: LayerPlan, window: int) -> LayerSpec:
        if plan.membership == "prompt" and wanted.clustered:
            made = prompt_layer(wanted, wanted.clusters[0].storage, config.head_dim, plan.warmup_tokens)
        else:
            made = planned_layer(wanted, plan.share, config)
        return dataclasses.replace(made, window=window)

    windows = config.windows or (0,) * config.num_layers
    return Spec(tuple(layer(*pair) for pair in zip(plan.layers, windows, strict=True)))


def planned_layer(wanted: LayerPlan, share: str, config: Architecture) -> LayerSpec:
    """The spec of one layer; `share` is the plan's, for a layer that names none."""
    share, queries = wanted.shares(share), wanted.queries or config.queries
    storages = [one.storage for one in wanted.clusters]
    order = cluster_order(share, [one.heads for one in wanted.clusters], storages)
    clusters = tuple(wanted.clusters[at].heads for at in order)
    groups = group_clusters(share, clusters, [storages[at] for at in order], per_head=queries)
    ranks = (wanted.key_rank or config.head_dim, wanted.value_rank or config.head_dim)
    made = LayerSpec(share, clusters, groups, *ranks, wanted.weights, queries=queries, channels=wanted.channels)
    return made if wanted.key_rank is None else dataclasses.replace(made, pairs=_any_pairs(made, config))


def _any_pairs(layer: LayerSpec, config: Architecture) -> tuple[tuple[int, ...], ...]:
    """Frequencies of rotary keys, which only the merge itself chooses; bytes and time do not depend on them."""
    if config.rotary is None:
        return ()
    return (tuple(at % (config.head_dim // 2) for at in range(layer.key_rank // 2)),) * len(layer.clusters)


def cluster_order(share: str, clusters: Sequence[tuple[int, ...]], storages: Sequence[str]) -> list[int]:
    """The order that makes groups contiguous: by storage, then by cluster size where that decides the shape.

    It is stable: singletons of one storage keep the heads' order.
    """
    sizes = [len(heads) if share in ("qk", "kv") else 1 for heads in clusters]
    return sorted(range(len(clusters)), key=lambda at: (STORAGES.index(storages[at]), sizes[at]))


def prompt_layer(wanted: LayerPlan, storage: str, head_dim: int, warmup: int) -> LayerSpec:
    """A layer whose clusters are found per prompt. The plan's clusters serve prompts shorter than the warm-up."""
    clusters = tuple((one.keep, *(head for head in one.heads if head != one.keep)) for one in wanted.clusters)
    groups = group_clusters("qk", clusters, [storage] * len(clusters), "prompt")
    return LayerSpec("qk", clusters, groups, head_dim, head_dim, wanted.weights, "prompt", warmup)


def uniform_plan(config: Architecture, share: str, clusters: float, storage: str) -> Plan:
    """A plan that merges neighbouring heads, alike in every layer.

    It is for time and bytes, which depend on how many clusters there are and not on which heads are in them.

    Args:
        clusters: of each layer, as a fraction of its heads.

    Raises:
        InputError: a share, storage or fraction that cannot be.
    """
    if not 0 < clusters <= 1:
        raise InputError(f"clusters is {clusters}; expected a fraction of the heads above 0, up to 1")
    heads, count = config.kv_heads, max(1, round(clusters * config.kv_heads))
    bounds = [heads * at // count for at in range(count + 1)]
    members = [tuple(range(*pair)) for pair in pairwise(bounds)]
    layer = LayerPlan(tuple(ClusterPlan(each, each[0], storage=storage) for each in members))
    plan = Plan((layer,) * config.num_layers, share)
    plan.check()
    return plan
