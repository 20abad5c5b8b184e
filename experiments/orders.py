"""In which order should distillation, quantization and targeted tuning follow clustering, and does it matter?

    python experiments/orders.py $MODEL --task sst2 --data-dir $DATA --seeds 0,1,2 --max-steps 24 --batch 32 \
        --accumulation 1 --lr 1e-4 --out runs/experiments

All six orders and all their prefixes, 16 nodes a seed, of which configurations.py makes eight. The best order is chosen
on held-out training rows; on the validation questions it is then compared with each of the five others by paired
differences, whose intervals hold for all five at once (Bonferroni). Expected: all six orders end at the same bytes.

Writes orders.json, .csv and .md.
"""

from itertools import permutations

from chai_jax.config import STAGES
from lab.options import Options, Record, start
from lab.paper import ORDERS
from lab.publish import publish
from lab.rows import columns, compare, row, signed
from lab.tree import Branch, forest

WHOLE = [("cluster", *order) for order in permutations(STAGES)]


def prefixes() -> list[tuple[str, ...]]:
    """Every node on the way to an order, each once, short ones first."""
    nodes = {order[:length]: None for order in WHOLE for length in range(1, len(STAGES) + 1)}
    return sorted(nodes, key=len)


def against_best(branches: list[Branch], rows: list[Record]) -> tuple[Record, list[Record]]:
    """The best whole order by held-out accuracy, and every other one compared with it."""
    whole = [one for one in rows if one["whole"]]
    best = max(whole, key=lambda one: one["held_out_acc"]["mean"])
    reference = [branch.measured(*best["stages"].split("+")) for branch in branches]
    others = [one for one in whole if one is not best]
    return best, [
        {"order": one["row"], "best": best["row"]}
        | compare(reference, [branch.measured(*one["stages"].split("+")) for branch in branches], len(others))
        for one in others
    ]


def say(best: Record, compared: list[Record]) -> str:
    """What the comparison comes to."""
    lowest = min(compared, key=lambda one: one["difference"])
    different = [one["order"] for one in compared if one["significant"]]
    told = (
        f"worse or better by more than the error: {'; '.join(different)}"
        if different
        else ("no other order differs from it by more than its error")
    )
    return (
        f"{best['model']} {best['task']}: best on held-out rows is {best['row']}; the lowest other on validation "
        f"is {lowest['order']}, {signed(lowest)} points (s.d. over seeds "
        f"{'-' if lowest['sd_over_seeds'] is None else format(100 * lowest['sd_over_seeds'], '.1f')}); {told}."
    )


def orders(options: Options) -> Record:
    """All rows of all models and tasks, and whether the order matters."""
    rows, findings, comparisons = [], [], []
    for trees in forest(options):
        branches = [tree.base for tree in trees]
        mine = [
            row(branches, stages, ", ".join(stages[1:]) or "clustering alone", judged=stages in WHOLE)
            | {"whole": stages in WHOLE}
            for stages in [*prefixes(), *WHOLE]
        ]
        best, compared = against_best(branches, mine)
        findings.append(say(best, compared))
        comparisons += [{"model": trees[0].name, "task": trees[0].task, **one} for one in compared]
        rows += mine
    shown = columns(
        "model", "task", "row", "acc", "stderr", "held_out", "difference", "kv_reduction", "model_reduction"
    )
    title = "Orders of the three stages"
    return publish(options, "orders", title, rows, shown, (ORDERS,), findings, comparisons=comparisons)


if __name__ == "__main__":
    start(orders, Options, __doc__)
