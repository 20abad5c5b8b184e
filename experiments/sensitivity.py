"""Does the sensitivity of layers differ from task to task, as the paper says, by more than its own noise?

    python experiments/sensitivity.py $MODEL --task sst2,rte,piqa --data-dir $DATA --seeds 0,1,2 --out runs/experiments

For each method (attention, perturbation, kl), task, seed and half of the calibration rows, the score of every layer of
the model as it is (not tuned on the task, so that the data alone differ). Then Spearman's rank correlation between all
pairs of score vectors: within a task it is the noise floor (other rows, other clusterings), between tasks it is what
the data change. Whether the second is lower than the first is tested by permuting the tasks' names among the vectors
(10,000 times, fixed seed; the statistic is the difference of the two means; one-sided p, at least 1 / 10,001).

Writes sensitivity.json, .csv, .md and per model a picture of every layer's mean score and tier by task.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import rankdata

from chai_jax.analyse.planner import plan
from chai_jax.analyse.probe import probe
from chai_jax.analyse.sensitivity import METHODS, tiers
from chai_jax.compress.quantize import with_storage
from chai_jax.files.atomic import write_json
from chai_jax.files.store import load
from chai_jax.inputs.reading import read_json
from chai_jax.report.figures import sensitivity as draw_layers
from chai_jax.run.options import parse_clusters
from lab.options import Options, Record, start
from lab.paper import SENSITIVITY
from lab.publish import publish
from lab.rows import where
from lab.tree import Tree, forest

PERMUTATIONS = 10_000


def scores(tree: Tree) -> dict[str, list[list[float]]]:
    """By method the scores of every layer on either half of the tree's calibration rows; kept in the tree."""
    path = tree.path / "sensitivity.json"
    if not path.exists():
        model = with_storage(load(tree.source), tree.config.storage)
        rows, planning = tree.work.calibration, tree.config.planning
        found: dict[str, list[list[float]]] = {method: [] for method in METHODS}
        for half in (rows[::2], rows[1::2]):
            seen = probe(model, half, window=max(map(len, half)))
            for method in METHODS:
                made = plan(
                    model,
                    seen,
                    share=planning.share or "qkv",
                    clusters=parse_clusters(planning.clusters or "elbow"),
                    sensitivity=method,
                    seed=tree.seed,
                )
                found[method].append(list(made.sensitivity))
        write_json(path, found)
    return read_json(path)


def correlations(vectors: np.ndarray) -> np.ndarray:
    """Spearman's rho between all pairs of rows [N, L]; [N, N]. Layers that all tie have none, and count as 0."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.corrcoef(rankdata(vectors, axis=1)))


def apart(rho: np.ndarray, tasks: Sequence[int]) -> float:
    """Mean rho of pairs within a task minus that of pairs between tasks."""
    upper = np.triu_indices(len(rho), 1)
    same = np.equal.outer(tasks, tasks)[upper]
    return float(rho[upper][same].mean() - rho[upper][~same].mean())


def permutation_p(rho: np.ndarray, tasks: Sequence[int], seed: int = 0) -> float:
    """How often shuffled tasks lie as far apart as the real ones (Phipson and Smyth 2010: never zero)."""
    random = np.random.default_rng(seed)
    real = apart(rho, tasks)
    hits = sum(apart(rho, random.permutation(tasks)) >= real - 1e-12 for _ in range(PERMUTATIONS))
    return (hits + 1) / (PERMUTATIONS + 1)


def pairs(rho: np.ndarray, tasks: Sequence[str], one: str, other: str) -> Record:
    """Mean, spread and number of the correlations between vectors of two tasks, or within one."""
    values = [
        rho[a, b]
        for a, b in combinations(range(len(tasks)), 2)
        if {tasks[a], tasks[b]} == {one, other} and (one == other) == (tasks[a] == tasks[b])
    ]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"rho": float(np.mean(values)), "rho_sd": deviation, "pairs": len(values)}


def of_model(groves: list[list[Tree]]) -> tuple[list[Record], list[str], list[Record]]:
    """Rows (a pair of tasks each), findings and the scores themselves, of one model."""
    rows, findings, layers = [], [], []
    name = groves[0][0].name
    for method in METHODS:
        vectors, tasks = [], []
        for trees in groves:
            mine = [half for tree in trees for half in scores(tree)[method]]
            vectors += mine
            tasks += [trees[0].task] * len(mine)
            mean = np.mean(mine, axis=0)
            layers += [
                {"model": name, "method": method, "task": trees[0].task, "layer": at, "score": score, "tier": tier}
                for at, (score, tier) in enumerate(zip(mean.tolist(), tiers(mean.tolist()), strict=True))
            ]
        rho, names = correlations(np.asarray(vectors)), list(dict.fromkeys(tasks))
        for one, other in [*((each, each) for each in names), *combinations(names, 2)]:
            rows.append({"model": name, "method": method, "task": one, "other": other} | pairs(rho, tasks, one, other))
        if len(names) > 1:
            numbers = [names.index(task) for task in tasks]
            p = permutation_p(rho, numbers)
            findings.append(
                f"{name}, {method}: correlation within a task exceeds that between tasks by {apart(rho, numbers):.2f} "
                f"(p = {p:.4f}): the layers' order {'differs' if p < 0.05 else 'does not differ'} by data set beyond "
                "the noise."
            )
    return rows, findings, layers


def sensitivity(options: Options) -> Record:
    """All models."""
    rows, findings, layers = [], [], []
    groves = list(forest(options))
    for model in dict.fromkeys(trees[0].source for trees in groves):
        mine = of_model([trees for trees in groves if trees[0].source == model])
        for whole, part in zip((rows, findings, layers), mine, strict=True):
            whole += part  # type: ignore[operator]
        draw(options, mine[2])
    shown: list[Any] = [
        ("model", lambda found: found["model"]),
        ("method", lambda found: found["method"]),
        ("tasks", lambda found: found["task"] + ("" if found["task"] == found["other"] else f" and {found['other']}")),
        ("Spearman's rho", lambda found: f"{found['rho']:.2f}"),
        ("s.d. over pairs", lambda found: "-" if found["rho_sd"] is None else f"{found['rho_sd']:.2f}"),
        ("pairs", lambda found: str(found["pairs"])),
    ]
    title = "Layer sensitivity by task and method"
    return publish(options, "sensitivity", title, rows, shown, (SENSITIVITY,), findings, layers=layers)


def draw(options: Options, layers: list[Record]) -> None:
    name = layers[0]["model"]
    for method in METHODS:
        bars = [
            {"layer": one["layer"], "sensitivity": one["score"], "tier": one["tier"], "series": one["task"]}
            for one in layers
            if one["method"] == method
        ]
        unit = "mean absolute score" if method == "attention" else "nats/token"
        caption = f"{name}, {method}: means over seeds {options.seeds} and halves of the calibration rows; {where()}."
        draw_layers(options.out / f"sensitivity-{name}-{method}", bars, caption, f"{method} ({unit})")


if __name__ == "__main__":
    start(sensitivity, Options, __doc__)
