"""Table 4: CHAI-Target's accuracy and latency, by each of the two policies that the paper gives.

    python experiments/target.py $MODEL --task sst2,rte,piqa --data-dir $DATA --seeds 0,1,2 --max-steps 24 --batch 32 \
        --accumulation 1 --lr 1e-4 --out runs/experiments

The dense model, clustering alone, and clustering followed by tuning the most sensitive 30 % of the layers
(`sensitive`, Algorithm 1) or those of the medium and low tiers (`medium-low`, section 3.3). Accuracy with its paired
difference to clustering alone; latency of all four timed in turn in one process. Expected: tuning changes no shape, so
the latencies of the last three are equal within their spread.

Writes target.json, .csv and .md.
"""

from lab.options import Options, Record, start
from lab.paper import TABLE_4
from lab.publish import publish
from lab.rows import columns, compare, row, signed
from lab.tree import forest

CLUSTER = ("cluster",)
POLICIES = {"sensitive": ("cluster", "target"), "medium-low": ("cluster", "target-medium-low")}


def target(options: Options) -> Record:
    """All rows of all models and tasks, and which policy is better where."""
    rows, findings = [], []
    for trees in forest(options):
        branches = [tree.base for tree in trees]
        timed = [branch.latency("target", [(), CLUSTER, *POLICIES.values()]) for branch in branches]
        rows += [
            row(branches, (), "base", None, timed),
            row(branches, CLUSTER, "chai", (), timed),
            *(row(branches, at, f"CHAI-Target {policy}", CLUSTER, timed) for policy, at in POLICIES.items()),
        ]
        between = compare(*([branch.measured(*at) for branch in branches] for at in POLICIES.values()))
        findings.append(
            f"{trees[0].name} {trees[0].task}: medium-low minus sensitive {signed(between)} points, "
            f"{'more' if between['significant'] else 'not more'} than its error."
        )
    shown = columns("model", "task", "row", "acc", "stderr", "against", "difference", "score", "decode", "decode_ratio")
    return publish(options, "target", "CHAI-Target (table 4)", rows, shown, (TABLE_4,), findings)


if __name__ == "__main__":
    start(target, Options, __doc__)
