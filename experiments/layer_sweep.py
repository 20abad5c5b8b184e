"""Tables 1, 2 and 5: what clustering 10, 30, 40, 50 and 100 % of the layers costs, before anything repairs it.

    python experiments/layer_sweep.py $MODEL --task sst2,rte,piqa --data-dir $DATA --seeds 0,1,2 --out runs/experiments

Per fraction the layers that were clustered (the most redundant first; a layer whose elbow has no knee is left alone),
accuracy of the clustered and of the original model, their paired difference with its 95 % interval, the share of key
and query heads that is gone, and the bytes of the cache. Expected: bytes and heads fall with every fraction; the
original accuracy of a model, task and seed is one and the same number in every row (the paper's moves).

Writes layer_sweep.json, .csv, .md and, per task, a picture of accuracy against cache bytes.
"""

from dataclasses import replace

from chai_jax.evaluation.statistics import Z95
from chai_jax.report.figures import pareto
from lab.options import Options, Record, start
from lab.paper import TABLE_1, TABLE_2, TABLE_5
from lab.publish import publish
from lab.rows import columns, row, spread, where
from lab.tree import Branch, Tree, forest

FRACTIONS = (0.1, 0.3, 0.4, 0.5, 1.0)


def swept(trees: list[Tree], fraction: float) -> Record:
    """One row: this fraction of the layers, over the seeds."""
    # Nothing is stored by tiers here, so the cheapest sensitivity will do.
    choices = {"layers": fraction, "kv_budget": None, "sensitivity": "attention"}
    branches = [tree.branch(f"layers-{fraction:g}", replace(tree.config.planning, **choices)) for tree in trees]
    found = row(branches, ("cluster",), f"{fraction:.0%}")
    heads = [head_reduction(branch) for branch in branches]
    clustered = [sum(layer.clustered for layer in branch.plan.layers) for branch in branches]
    original = spread([branch.measured().acc for branch in branches])
    asked = {"fraction": fraction, "layers": len(branches[0].plan.layers), "clustered_layers": spread(clustered)}
    return {**found, **asked, "head_reduction": spread(heads), "original_acc": original}


def head_reduction(branch: Branch) -> float:
    """The share of key heads that no longer exists."""
    layers = branch.plan.layers
    return 1 - sum(len(layer.clusters) for layer in layers) / sum(
        len(one.heads) for layer in layers for one in layer.clusters
    )


def draw(options: Options, rows: list[Record]) -> None:
    """Accuracy against cache bytes, a panel per task; the bars are 95 % intervals over questions."""
    points = [
        {
            "series": one["task"],
            "label": one["row"],
            "KV bytes per token": one["kv_bytes_per_token"]["mean"],
            "acc": 100 * one["acc"]["mean"],
            "acc_low": 100 * (one["acc"]["mean"] - Z95 * one["acc_stderr"]),
            "acc_high": 100 * (one["acc"]["mean"] + Z95 * one["acc_stderr"]),
        }
        for one in rows
    ]
    for model in dict.fromkeys(one["model"] for one in rows):
        mine = [point for point, one in zip(points, rows, strict=True) if one["model"] == model]
        sizes = ", ".join(dict.fromkeys(f"{one['task']} n = {one['n']}" for one in rows if one["model"] == model))
        caption = f"{model}, clustering alone, 10 to 100 % of the layers; {sizes}; seeds {options.seeds}; bars: 95 %."
        panels = [("acc", "accuracy (%)")]
        pareto(options.out / f"layer_sweep-{model}", mine, panels, "KV bytes per token", f"{caption} {where()}.")


def sweep(options: Options) -> Record:
    """All fractions on all models and tasks."""
    rows = [swept(trees, fraction) for trees in forest(options) for fraction in FRACTIONS]
    draw(options, rows)
    shown = columns(
        "model", "task", "fraction", "clustered", "acc", "stderr", "original", "difference", "heads", "kv_bytes"
    )
    title = "Layer sweep (tables 1, 2 and 5)"
    return publish(options, "layer_sweep", title, rows, shown, (TABLE_1, TABLE_2, TABLE_5), losses(rows))


def losses(rows: list[Record]) -> list[str]:
    """Which rows lost accuracy by more than their error."""
    lost = [one for one in rows if one.get("difference_interval", [0, 0])[1] < 0]
    named = ", ".join(f"{one['model']} {one['task']} {one['row']}" for one in lost) or "none"
    return [f"Rows whose 95 % interval lies below zero, of {len(rows)}: {named}."]


if __name__ == "__main__":
    start(sweep, Options, __doc__)
