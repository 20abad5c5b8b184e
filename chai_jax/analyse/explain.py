"""A plan in words and bytes: the spec it leads to, and a table of what becomes of each layer."""

from typing import Any

from rich import box
from rich.table import Table

from chai_jax.compress.cluster import prompt_layer
from chai_jax.compress.slice import cluster_order
from chai_jax.model.cache import BYTES, bytes_per_token
from chai_jax.model.params import OPTConfig
from chai_jax.plans import LayerPlan, Plan
from chai_jax.spec import STORAGES, LayerSpec, Spec, group_clusters


def cache_fraction(plan: Plan, config: OPTConfig) -> float:
    """Cache bytes of a plan's model over those of the dense bfloat16 cache, by formula."""
    dense = Spec.dense(config.num_layers, config.num_heads, config.head_dim, "bfloat16")
    return bytes_per_token(planned_spec(plan, config)) / bytes_per_token(dense)


def planned_spec(plan: Plan, config: OPTConfig) -> Spec:
    """The spec of the model that `cluster` and `quantize` make by this plan.

    Raises:
        InputError: the plan is for another shape of model.
    """
    plan.check_model(config.num_layers, config.num_heads, config.hidden_size)

    def layer(wanted: LayerPlan) -> LayerSpec:
        if plan.membership == "prompt" and wanted.clustered:
            return prompt_layer(wanted, wanted.clusters[0].storage, config.head_dim, plan.warmup_tokens)
        return planned_layer(wanted, plan.share, config)

    return Spec(tuple(layer(wanted) for wanted in plan.layers))


def planned_layer(wanted: LayerPlan, share: str, config: OPTConfig) -> LayerSpec:
    """The spec of one layer; `share` is the plan's, for a layer that names none."""
    share = (wanted.share or share) if wanted.merged else "dense"
    storages = [one.storage for one in wanted.clusters]
    order = cluster_order(share, [one.heads for one in wanted.clusters], storages)
    clusters = tuple(wanted.clusters[at].heads for at in order)
    groups = group_clusters(share, clusters, [storages[at] for at in order])
    ranks = (wanted.key_rank or config.head_dim, wanted.value_rank or config.head_dim)
    return LayerSpec(share, clusters, groups, *ranks, wanted.weights)


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
                "share": plan.share_of(index) if layer.merged else "dense",
                "heads": sum(len(one.heads) for one in layer.clusters),
                "clusters": len(layer.clusters),
                "key_rank": layer.key_rank,
                "value_rank": layer.value_rank,
                "critical": sum(one.critical for one in layer.clusters),
                "storage": {name: storages.count(name) for name in STORAGES if name in storages},
                "weights": layer.weights,
            }
        )
    if config is None:
        return rows
    spec = planned_spec(plan, config)
    per_layer = [bytes_per_token(Spec((layer,))) for layer in spec.layers]
    dense = 2 * config.hidden_size * BYTES["bfloat16"]
    for row, size in zip(rows, per_layer, strict=True):
        row |= _sizes(size, dense)
    return [*rows, {"layer": "total", **_sizes(sum(per_layer), dense * len(rows))}]


def _sizes(size: int | float, dense: int) -> dict[str, Any]:
    return {"kv_bytes_per_token": size, "dense_kv_bytes_per_token": dense, "kv_reduction": 1 - size / dense}


def explain_table(plan: Plan, config: OPTConfig | None = None) -> Table:
    """`explain` as a table that fits 80 columns."""
    rows = explain(plan, config)
    used = [name for name in STORAGES if any(name in row.get("storage", ()) for row in rows)]
    found = f"per prompt ({plan.warmup_tokens} tokens)" if plan.membership == "prompt" else plan.membership
    title = f"{found} {plan.score_merge}, {plan.value_merge}; by {plan.method}"
    caption = f"{', '.join(used)}: how many clusters cache keys and values so"
    ranks = any(row.get("key_rank") or row.get("value_rank") for row in rows)
    if ranks:
        caption += "; R: rank of keys, values"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = ["layer", "score", "tier", "share", "C/H", *(["R"] if ranks else []), *used, "weights"]
    for name in names + (["B/token", "saved"] if config else []):
        table.add_column(name, justify="left" if name in ("tier", "share", "weights") else "right")
    for row in rows:
        cells = [""] * (len(names) - 1)
        if "tier" in row:
            score = "" if row["sensitivity"] is None else f"{row['sensitivity']:.2g}"
            counts = (str(row["storage"].get(name, 0)) for name in used)
            rank = [f"{row['key_rank'] or '-'},{row['value_rank'] or '-'}"] if ranks else []
            share = f"{row['clusters']}/{row['heads']}"
            cells = [score, row["tier"], row["share"], share, *rank, *counts, row["weights"]]
        if config:
            cells += [f"{row['kv_bytes_per_token']:,}", f"{row['kv_reduction']:.1%}"]
        table.add_row(str(row["layer"]), *cells)
    return table
