"""Rows of tables and pictures: what a node of the tree came to over the seeds, and how two nodes compare."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from chai_jax.evaluation.result import Result
from chai_jax.evaluation.statistics import paired, standard_error
from chai_jax.report.tables import Column, percent
from chai_jax.run.environment import where_computed
from lab.options import Record
from lab.tree import Branch

Stages = Sequence[str]


def spread(values: Sequence[float]) -> Record:
    """Mean and standard deviation (ddof 1; None for one value) over the seeds."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": deviation}


def right(results: Sequence[Result]) -> np.ndarray:
    """Of every question the share of seeds that answered it rightly, float [N]."""
    return np.mean([result.right for result in results], axis=0)


def compare(first: Sequence[Result], second: Sequence[Result], comparisons: int = 1) -> Record:
    """Mean accuracy of the second minus that of the first, question by question and seed by seed.

    Answers are averaged over the seeds before they are paired, so the interval is about other questions of the task;
    `sd_over_seeds` is about other seeds.

    Args:
        comparisons: how many of this kind are made at once: the interval is one of 95 % for all of them together
            (Bonferroni), and `significant` says whether it leaves out zero.
    """
    found = paired(right(first), right(second))
    z = NormalDist().inv_cdf(1 - 0.025 / comparisons)
    half = z * found.difference_stderr
    each = [b.acc - a.acc for a, b in zip(first, second, strict=True)]
    return {
        "difference": found.difference,
        "difference_stderr": found.difference_stderr,
        "difference_interval": [found.difference - half, found.difference + half],
        "sd_over_seeds": spread(each)["sd"],
        "comparisons": comparisons,
        "significant": abs(found.difference) > half,
    }


def row(
    branches: Sequence[Branch],
    stages: Stages,
    label: str = "",
    against: Stages | None = (),
    timed: Sequence[dict[str, Record]] = (),
    judged: bool = False,
) -> Record:
    """One node over the seeds of a model and task.

    Args:
        branches: one per seed.
        against: the node it is compared with; None: with nothing.
        timed: what `Branch.latency` gave, per seed, where the node was timed.
        judged: whether to say how it did on the held-out training questions, by which choices are made.
    """
    tree, name = branches[0].tree, "+".join(stages) or "dense"
    results = [branch.measured(*stages) for branch in branches]
    made, dense = [branch.made(*stages) for branch in branches], [branch.made() for branch in branches]
    metrics = [result.metrics() for result in results]
    found: Record = {
        "model": tree.name,
        "task": tree.task,
        "row": label or name,
        "stages": name,
        "seeds": [branch.tree.seed for branch in branches],
        "n": results[0].n,
        "acc": spread([result.acc for result in results]),
        "acc_stderr": standard_error(right(results)),
        "acc_by_seed": [result.acc for result in results],
        "majority": metrics[0]["majority"],
        "at_chance": [one["at_chance"] for one in metrics],
        "ece": spread([one["ece"] for one in metrics]),
        "ece_interval_by_seed": [one["ece_interval"] for one in metrics],
        "kv_bytes_per_token": spread([one["kv_bytes_per_token"] for one in made]),
        "kv_reduction": spread([one["kv_reduction"] for one in made]),
        "model_bytes": spread([one["model_bytes"] for one in made]),
        "model_reduction": spread(
            [1 - one["model_bytes"] / before["model_bytes"] for one, before in zip(made, dense, strict=True)]
        ),
        "seconds": spread([one["seconds"] for one in made]),
        "updates": made[0]["updates"],
    }
    if against is not None and tuple(against) != tuple(stages):
        found["against"] = "+".join(against) or "dense"
        found |= compare([branch.measured(*against) for branch in branches], results)
    if judged:
        found["held_out_acc"] = spread([branch.judged(*stages).acc for branch in branches])
        found["held_out_n"] = branches[0].judged(*stages).n
    if timed:
        found["latency"] = latency_of([one[name] for one in timed])
    return found


def latency_of(timed: Sequence[Record]) -> Record:
    """Medians, averaged over the seeds, and the ratios to the model that was timed first in the same run."""
    measures = ("score_ms_per_example", "decode_ms_per_token")
    found: Record = {measure: spread([one[measure]["median"] for one in timed]) for measure in measures}
    ratios = {
        f"{measure}_ratio": spread([one["ratio_to_first"][measure]["median"] for one in timed]) for measure in measures
    }
    return found | ratios | {name: timed[0][name] for name in ("n", "batch", "prompt", "new_tokens", "device", "dtype")}


def pm(value: Record | None, scale: float = 1, digits: int = 1) -> str:
    """mean ± s.d. over the seeds."""
    if value is None:
        return "-"
    deviation = "" if value["sd"] is None else f" ± {scale * value['sd']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{deviation}"


def signed(found: Record) -> str:
    """A paired difference in points with its interval."""
    if "difference" not in found:
        return "-"
    low, high = (100 * bound for bound in found["difference_interval"])
    return f"{100 * found['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def latency_cell(measure: str, digits: int = 2) -> Any:
    return lambda found: pm(found.get("latency", {}).get(measure), 1, digits)


# The columns that experiments choose from, by name.
COLUMNS: dict[str, Column] = {
    "model": ("model", lambda found: found["model"]),
    "task": ("task", lambda found: found["task"]),
    "row": ("row", lambda found: found["row"]),
    "acc": ("accuracy, %, mean ± s.d. over seeds", lambda found: pm(found["acc"], 100)),
    "stderr": ("s.e. over questions", lambda found: f"{100 * found['acc_stderr']:.1f} (n = {found['n']})"),
    "held_out": ("held-out accuracy, %", lambda found: pm(found.get("held_out_acc"), 100)),
    "difference": ("difference, points [95 %]", signed),
    "against": ("to", lambda found: found.get("against", "-")),
    "kv_bytes": ("KV B/token", lambda found: pm(found["kv_bytes_per_token"], 1, 0)),
    "kv_reduction": ("KV reduction, %", lambda found: pm(found["kv_reduction"], 100)),
    "model_reduction": ("weights' reduction, %", lambda found: pm(found["model_reduction"], 100)),
    "score": ("ms/example", latency_cell("score_ms_per_example", 3)),
    "decode": ("ms/token", latency_cell("decode_ms_per_token")),
    "score_ratio": ("ratio of ms/example", latency_cell("score_ms_per_example_ratio")),
    "decode_ratio": ("ratio of ms/token", latency_cell("decode_ms_per_token_ratio")),
    "ece": ("ECE, %", lambda found: pm(found["ece"], 100)),
    "original": ("original accuracy, %", lambda found: pm(found["original_acc"], 100)),
    "fraction": ("layers asked for", lambda found: percent(found["fraction"], 0)),
    "clustered": ("layers clustered", lambda found: f"{pm(found['clustered_layers'])} of {found['layers']}"),
    "heads": ("head reduction, %", lambda found: pm(found["head_reduction"], 100)),
}


def columns(*names: str) -> list[Column]:
    return [COLUMNS[name] for name in names]


def where() -> str:
    """Device and dtype, for a caption."""
    found = where_computed()
    return f"{found['device']}, {found['compute_dtype']}"


def tradeoff(rows: Sequence[Record]) -> tuple[list[Record], str]:
    """Accuracy (%), latency (ms/token) and KV reduction (%), and the caption that says of what."""
    points = [
        {
            "label": one["row"],
            "accuracy": 100 * one["acc"]["mean"],
            "latency": one["latency"]["decode_ms_per_token"]["mean"],
            "reduction": 100 * one["kv_reduction"]["mean"],
        }
        for one in rows
    ]
    first, timed = rows[0], rows[0]["latency"]
    caption = (
        f"{first['model']}, {first['task']}, n = {first['n']}; means over seeds {', '.join(map(str, first['seeds']))}; "
        f"latency: median of {timed['n']} rounds, batch {timed['batch']}, {timed['device']}, {timed['dtype']}."
    )
    return points, caption
