"""A plan in words and bytes: the spec it leads to, and a table of what becomes of each layer."""

from typing import Any

from rich import box
from rich.table import Table

from chai_jax.model.cache import BYTES, bytes_per_token
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import STORAGES
from chai_jax.plans.plan import Plan
from chai_jax.plans.planned import planned_spec
from chai_jax.plans.spec import Spec


def cache_fraction(plan: Plan, config: Architecture) -> float:
    """Cache bytes of a plan's model over those of the dense bfloat16 cache, by formula."""
    dense = Spec.of(config, "bfloat16")
    return bytes_per_token(planned_spec(plan, config)) / bytes_per_token(dense)


def explain(plan: Plan, config: Architecture | None = None) -> list[dict[str, Any]]:
    """A plan as plain rows, one per layer; with a model's configuration also bytes, and a last row of totals.

    `kv_bytes_per_token` and `dense_kv_bytes_per_token` (bfloat16) are by formula, for one sequence;
    `kv_reduction` is 1 - their ratio. `queries` says how many queries each head keeps, where the plan merges any;
    `key_bits` how many bits a key takes without its scales, where keys are in a basis.
    """
    rows = []
    queries = next((sum(map(len, layer.query_clusters[0])) for layer in plan.layers if layer.query_clusters), None)
    for index, layer in enumerate(plan.layers):
        storages = [one.storage for one in layer.clusters]
        rows.append(
            {
                "layer": index,
                "sensitivity": plan.sensitivity[index] if plan.sensitivity else None,
                "tier": layer.tier,
                "share": layer.shares(plan.share),
                "heads": sum(len(one.heads) for one in layer.clusters),
                "clusters": len(layer.clusters),
                **({} if queries is None else {"queries": {"kept": layer.queries or queries, "of": queries}}),
                "key_rank": layer.key_rank,
                "value_rank": layer.value_rank,
                "critical": sum(one.critical for one in layer.clusters),
                "storage": {name: storages.count(name) for name in STORAGES if name in storages},
                **({"key_bits": sum(bits * count for bits, count in layer.channels)} if plan.has_basis else {}),
                "weights": layer.weights,
            }
        )
    if config is None:
        return rows
    spec = planned_spec(plan, config)
    per_layer = [bytes_per_token(Spec((layer,))) for layer in spec.layers]
    dense = 2 * config.kv_heads * config.head_dim * BYTES["bfloat16"]
    for row, size in zip(rows, per_layer, strict=True):
        row |= _sizes(size, dense)
    return [*rows, {"layer": "total", **_sizes(sum(per_layer), dense * len(rows))}]


def _sizes(size: int | float, dense: int) -> dict[str, Any]:
    return {"kv_bytes_per_token": size, "dense_kv_bytes_per_token": dense, "kv_reduction": 1 - size / dense}


def explain_table(plan: Plan, config: Architecture | None = None) -> Table:
    """`explain` as a table that fits 80 columns, with how heads are merged and what that costs above it."""
    rows = explain(plan, config)
    used = [name for name in STORAGES if any(name in row.get("storage", ()) for row in rows)]
    ranks = any(row.get("key_rank") or row.get("value_rank") for row in rows)
    fewer = any(row.get("queries") for row in rows)
    bases = plan.has_basis
    told = f"C/H: clusters of key/value heads; {', '.join(used)}: how many are cached so"
    caption = told + "; R: rank of keys, values" * ranks + "; Q/n: queries that a key/value head keeps" * fewer
    caption += "; bits: of a key in a basis, without scales" * bases
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title="\n".join(_about(plan)), title_justify="left", caption=caption, caption_justify="left", **look)
    optional = [name for name, is_there in (("Q/n", fewer), ("R", ranks)) if is_there]
    names = ["layer", "score", "tier", "share", "C/H", *optional, *used, *["bits"] * bases, "weights"]
    for name in names + (["B/token", "saved"] if config else []):
        table.add_column(name, justify="left" if name in ("tier", "share", "weights") else "right")
    for row in rows:
        cells = [""] * (len(names) - 1)
        if "tier" in row:
            score = "" if row["sensitivity"] is None else f"{row['sensitivity']:.2g}"
            counts = (str(row["storage"].get(name, 0)) for name in used)
            rank = [f"{row['key_rank'] or '-'},{row['value_rank'] or '-'}"] if ranks else []
            share = f"{row['clusters']}/{row['heads']}"
            kept = [f"{row['queries']['kept']}/{row['queries']['of']}"] if fewer else []
            bits = [str(row["key_bits"] or "-")] if bases else []
            cells = [score, row["tier"], row["share"], share, *kept, *rank, *counts, *bits, row["weights"]]
        if config:
            cells += [f"{row['kv_bytes_per_token']:,}", f"{row['kv_reduction']:.1%}"]
        table.add_row(str(row["layer"]), *cells)
    return table


def _about(plan: Plan) -> list[str]:
    """How clusters are found and merged, and what that does to the next-token distribution as far as the plan knows."""
    found = f"per prompt ({plan.warmup_tokens} tokens)" if plan.membership == "prompt" else plan.membership
    known = [f"{name} {value:.2g}" for name in ("predicted", "measured") if (value := getattr(plan, name)) is not None]
    return [
        f"clusters: {found}; tiers by {plan.method}",
        f"scores: {plan.score_merge}, values: {plan.value_merge}",
        *([f"KL, nats/token: {', '.join(known)}"] if known else []),
    ]
