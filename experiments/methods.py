"""Table 6: clustering alone, and with each of the three methods by itself.

    python experiments/methods.py $MODEL --task sst2,rte,piqa --data-dir $DATA --seeds 0,1,2 --max-steps 24 --batch 32 \
        --accumulation 1 --lr 1e-4 --out runs/experiments

Accuracy with its paired difference to clustering alone; latency before (the dense model) and after, timed in turn in
one process; bytes of cache and weights. Expected: only quantization changes bytes beyond those of clustering.

Writes methods.json, .csv and .md, and per model and task a heatmap. Its nodes are those of configurations.py.
"""

from chai_jax.report.figures import heatmap
from lab.options import Options, Record, start
from lab.paper import TABLE_6
from lab.publish import publish
from lab.rows import columns, row, tradeoff
from lab.tree import forest

CLUSTER = ("cluster",)
METHODS = {
    "clustering alone": CLUSTER,
    "clustering + quantization": ("cluster", "quantize"),
    "clustering + targeted tuning": ("cluster", "target"),
    "clustering + distillation": ("cluster", "distil"),
}


def methods(options: Options) -> Record:
    """All rows of all models and tasks."""
    rows = []
    for trees in forest(options):
        branches = [tree.base for tree in trees]
        timed = [branch.latency("methods", [(), *METHODS.values()]) for branch in branches]
        mine = [row(branches, (), "dense", None, timed)]
        mine += [row(branches, at, label, CLUSTER, timed) for label, at in METHODS.items()]
        heatmap(options.out / f"methods-{trees[0].name}-{trees[0].task}", *tradeoff(mine), title="Methods (table 6)")
        rows += mine
    shown = columns(
        "model", "task", "row", "acc", "stderr", "difference", "score", "decode", "decode_ratio", "kv_reduction",
        "model_reduction",
    )  # fmt: skip
    return publish(options, "methods", "Methods (table 6)", rows, shown, (TABLE_6,))


if __name__ == "__main__":
    start(methods, Options, __doc__)
