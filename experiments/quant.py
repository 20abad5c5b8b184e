"""Table 3: CHAI-Quant's accuracy, and what it really saves, by task and size of model.

    python experiments/quant.py $MODEL1 $MODEL2 --task sst2,rte,piqa --data-dir $DATA --seeds 0,1,2 \
        --out runs/experiments

Per model and task: the dense model; its cache in int8 and nothing else, the rival that any user has for free;
clustering; clustering and quantization by tiers. Accuracy, paired difference to the dense model, bytes of the cache
and of the weights. Expected: int8 alone saves nearly half of the cache, 1 - (1 + 2 / K) / 2 with K the head dimension
(48.4 % at K = 64, 46.9 % at 32), and quantization saves cache in every row (bytes are sums over real arrays).

Writes quant.json, .csv and .md. No training: minutes on a CPU for a small model.
"""

from lab.options import Options, Record, start
from lab.paper import TABLE_3
from lab.publish import publish
from lab.rows import columns, row
from lab.tree import forest

NODES = {
    "base": (),
    "int8 cache alone": ("int8",),
    "chai": ("cluster",),
    "CHAI-Quant": ("cluster", "quantize"),
}


def quant(options: Options) -> Record:
    """All rows of all models and tasks."""
    rows = []
    for trees in forest(options):
        branches = [tree.base for tree in trees]
        rows += [row(branches, stages, label) for label, stages in NODES.items()]
    shown = columns(
        "model", "task", "row", "acc", "stderr", "difference", "kv_bytes", "kv_reduction", "model_reduction"
    )
    findings = [
        f"{one['model']} {one['task']}: CHAI-Quant's cache is {100 * one['kv_reduction']['mean']:.1f} % smaller than "
        f"the dense bfloat16 one, the int8 cache alone {100 * alone['kv_reduction']['mean']:.1f} %."
        for one, alone in zip(named(rows, "CHAI-Quant"), named(rows, "int8 cache alone"), strict=True)
    ]
    return publish(options, "quant", "CHAI-Quant (table 3)", rows, shown, (TABLE_3,), findings)


def named(rows: list[Record], label: str) -> list[Record]:
    return [one for one in rows if one["row"] == label]


if __name__ == "__main__":
    start(quant, Options, __doc__)
