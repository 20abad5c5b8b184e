"""Table 7 and the paper's figures: the eight configurations of distillation, quantization and targeted tuning.

    python experiments/configurations.py $MODEL --task sst2,rte,piqa --data-dir $DATA --seeds 0,1,2 --max-steps 24 \
        --batch 32 --accumulation 1 --lr 1e-4 --out runs/experiments

Every configuration begins with clustering (000 is clustering alone) and applies its stages in the default order. Rows
are named by their stages; beside them are the paper's bits (Quant, Target, KD). Mean ± s.d. over the seeds, paired
difference to the dense teacher, cache, weights, latency of all nine timed in turn in one process, calibration error.
The best by accuracy is chosen on held-out training rows, those by latency and size by what was measured; each is then
compared with the dense teacher. Goal on SST-2: of those with a KV reduction of at least 55 % the best by held-out
accuracy is within 1 point of the teacher.

Writes configurations.json, .csv, .md and per model and task a radar, a heatmap, a 3D scatter with its projections, and
the training losses of the last configuration.
"""

from itertools import product

from chai_jax.config import STAGES
from chai_jax.report.figures import heatmap, losses, radar, scatter3d
from chai_jax.run.pipeline import choose
from lab.options import Options, Record, start
from lab.paper import TABLE_7
from lab.publish import publish
from lab.rows import columns, pm, row, signed, tradeoff, where
from lab.tree import Branch, forest

BITS = ("quantize", "target", "distil")  # as the paper's table has them
GOAL = {"points": 1.0, "kv_reduction": 0.55}


def configurations() -> dict[str, tuple[str, ...]]:
    """Stages by the paper's bits, 000 first."""
    wanted = {}
    for bits in product((0, 1), repeat=len(BITS)):
        chosen = [stage for stage, bit in zip(BITS, bits, strict=True) if bit]
        wanted["".join(map(str, bits))] = ("cluster", *(stage for stage in STAGES if stage in chosen))
    return wanted


def best(rows: list[Record], criterion: str) -> Record:
    """The configuration that `chai-jax run --select` would choose of these rows (the first is the dense model)."""
    records = [
        {
            "stage": one["stages"],
            "latency": {"decode_ms_per_token": {"median": one["latency"]["decode_ms_per_token"]["mean"]}},
            "kv_bytes_per_token": one["kv_bytes_per_token"]["mean"],
        }
        for one in rows
    ]
    cost = {one["stages"]: 1 - one["held_out_acc"]["mean"] for one in rows}
    return rows[choose(criterion, records, cost.__getitem__)]


def verdict(criterion: str, chosen: Record) -> str:
    """What the chosen configuration costs against the dense teacher."""
    intervals = ", ".join(f"[{100 * low:.1f}, {100 * high:.1f}]" for low, high in chosen["ece_interval_by_seed"])
    return (
        f"{chosen['model']} {chosen['task']}, best by {criterion}: {chosen['row']}, {pm(chosen['acc'], 100)} %, "
        f"{signed(chosen)} points to the dense teacher, KV reduction {100 * chosen['kv_reduction']['mean']:.1f} %, "
        f"{chosen['latency']['decode_ms_per_token_ratio']['mean']:.2f} of its time per token, ECE "
        f"{100 * chosen['ece']['mean']:.1f} % (95 % by seed: {intervals})."
    )


def goal(rows: list[Record]) -> str:
    """Whether the project's goal is met by the best of those that save enough, by the estimate and by its interval."""
    about = f"{rows[0]['model']} {rows[0]['task']}"
    wanted = f"within {GOAL['points']:g} point of the teacher at a KV reduction of {GOAL['kv_reduction']:.0%} or more"
    enough = [one for one in rows if one["kv_reduction"]["mean"] >= GOAL["kv_reduction"]]
    if not enough:
        return f"{about}: {wanted}: not met, none saves so much."
    chosen = best([rows[0], *enough], "accuracy")
    near, surely = (
        points >= -GOAL["points"] / 100 for points in (chosen["difference"], chosen["difference_interval"][0])
    )
    met = "not met" if not near else "met" if surely else "met by the estimate, not by its whole interval"
    return f"{about}: {wanted}: {met}. {verdict('accuracy of those', chosen)}"


def initials(label: str) -> str:
    """`cluster + distil` as `C+D`: where nine labels stand in one picture."""
    return label if label == "dense" else "+".join(stage[0].upper() for stage in label.split(" + "))


def draw(options: Options, rows: list[Record], first: Branch, last: tuple[str, ...]) -> None:
    name = f"{rows[0]['model']}-{rows[0]['task']}"
    points, caption = tradeoff(rows)
    radar(options.out / f"radar-{name}", points, caption)
    heatmap(options.out / f"heatmap-{name}", points, caption, title="Configurations (table 7)")
    short = [{**one, "label": initials(one["label"])} for one in points]
    scatter3d(options.out / f"scatter3d-{name}", short, f"C cluster, D distil, Q quantize, T target. {caption}")
    logs = [line for at in range(2, len(last) + 1) for line in first.log(*last[:at])]
    caption = f"{name}, seed {first.tree.seed}, {'+'.join(last)}; {where()}."
    losses(options.out / f"losses-{name}", logs, caption)


def compare_all(options: Options) -> Record:
    """All rows of all models and tasks, the best of each kind, and the pictures."""
    rows, findings, wanted = [], [], configurations()
    for trees in forest(options):
        branches = [tree.base for tree in trees]
        timed = [branch.latency("configurations", [(), *wanted.values()]) for branch in branches]
        mine = [row(branches, (), "dense", None, timed, judged=True) | {"bits": "-"}]
        mine += [
            row(branches, stages, " + ".join(stages), (), timed, judged=True) | {"bits": bits}
            for bits, stages in wanted.items()
        ]
        draw(options, mine, branches[0], wanted["111"])
        chosen = {criterion: best(mine, criterion) for criterion in ("accuracy", "latency", "size")}
        findings += [verdict(criterion, one) for criterion, one in chosen.items()] + [goal(mine)]
        rows += mine
    shown = [("bits", lambda found: found["bits"])]
    shown += columns(
        "row", "model", "task", "acc", "stderr", "held_out", "difference", "kv_reduction", "model_reduction", "decode",
        "decode_ratio", "ece",
    )  # fmt: skip
    title = "The eight configurations (table 7)"
    return publish(options, "configurations", title, rows, shown, (TABLE_7,), findings, goal=GOAL)


if __name__ == "__main__":
    start(compare_all, Options, __doc__)
