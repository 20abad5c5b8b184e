"""The pictures of a run: which there are, what each shows, and the rows they are drawn from."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from chai_jax.inputs.reading import Record
from chai_jax.report.figures import (
    TRADEOFF,
    Measure,
    heatmap,
    losses,
    pareto,
    pipeline_diagram,
    radar,
    scatter3d,
    sensitivity,
    unbeaten,
)
from chai_jax.report.figures.draw import PictureRow
from chai_jax.report.saved import SavedRun
from chai_jax.report.tables import score

PERPLEXITY = Measure("perplexity", "perplexity", lower=True, format=".2f")
COST = "KV cache (% of dense bfloat16)"
UNITS = {"kl": "KL (nats/token)", "perturbation": "rise of the loss (nats/token)", "attention": "mean |score|"}


@dataclass(frozen=True)
class Picture:
    """A picture: its files (`path` without .png, .svg or .csv), and what it says to who cannot see it."""

    path: Path
    title: str
    alt: str


@dataclass(frozen=True)
class Drawing:
    """A picture to be: the name of its files, and what draws it at a path."""

    name: str
    title: str
    alt: str
    at: Callable[[Path], object]


def draw(run: SavedRun, folder: Path) -> list[Picture]:
    """Draw a run's pictures into `folder`; the head maps, drawn when the plan was made, are taken from the run."""
    found = []
    for one in (*_of_stages(run), *_of_layers(run)):
        one.at(folder / one.name)
        found.append(Picture(folder / one.name, one.title, f"{one.alt} The numbers: {one.name}.csv."))
    heads = run.path / "report" / "heads"
    if heads.with_suffix(".svg").is_file() and heads.with_suffix(".png").is_file():
        alt = "Similarity of every two key/value heads of each layer, ordered by cluster. The numbers: heads.csv."
        found.append(Picture(heads, "Which heads attend alike", alt))
    return found


def _of_stages(run: SavedRun) -> Iterator[Drawing]:
    """What the stages did, cost and bought."""
    measures, rows = tradeoff(run.records)
    latency = run.records[0]["latency"]
    timed = f"latency: median of {latency['n']} interleaved trials, batch {latency['batch']}"
    note = f"{run.scored_on}; {timed}; {run.measured_on}."
    names = ", ".join(row["label"] for row in rows)
    yield Drawing(
        "pipeline",
        "What was done, and what came out",
        f"The stages in order ({names}), each with its score, cache, weights and time.",
        partial(pipeline_diagram, rows=steps(run), caption=note),
    )
    yield Drawing(
        "tradeoff",
        "Score, latency and size",
        f"{names} as points in space, and the three projections.",
        partial(scatter3d, rows=rows, caption=note, measures=measures, title="Score, latency and size"),
    )
    yield Drawing(
        "radar",
        "Each stage against the best",
        f"A polygon each for {names}; outside is better.",
        partial(radar, rows=rows, caption=note, measures=measures),
    )
    columns, cells = metrics_of(run.records)
    yield Drawing(
        "stages",
        "Gains and losses",
        f"{names} by metric; red is worse than dense, blue better.",
        partial(heatmap, rows=cells, caption=note, measures=columns),
    )
    points, measure = scores(run.records)
    yield Drawing(
        "pareto",
        "Score against cache",
        f"Scores of {names} with 95 % intervals against the bytes of their cache.",
        partial(draw_front, rows=points, measure=measure, note=note),
    )


def _of_layers(run: SavedRun) -> Iterator[Drawing]:
    """How sensitive the layers are, and how training went."""
    plan = run.plan
    if plan.sensitivity:
        bars = [
            {"layer": at, "sensitivity": value, "tier": layer.tier}
            for at, (value, layer) in enumerate(zip(plan.sensitivity, plan.layers, strict=True))
        ]
        note = f"Method {plan.method}, on calibration text of {run.records[0]['task']}; {run.measured_on}."
        yield Drawing(
            "sensitivity",
            "How sensitive each layer is",
            f"A bar for each of {len(bars)} layers in the colour of its tier.",
            partial(sensitivity, rows=bars, caption=note, label=UNITS.get(plan.method, "sensitivity")),
        )
    if run.updates:
        curve = [{"stage": one["run_stage"], "step": one["step"], "loss": one["loss"]} for one in run.updates]
        note = f"Losses of different stages are not the same quantity. {run.measured_on}."
        yield Drawing(
            "losses",
            "Training",
            "Loss against update, a panel for each stage that trained.",
            partial(losses, rows=curve, caption=note),
        )


def tradeoff(records: Sequence[Record]) -> tuple[tuple[Measure, ...], list[PictureRow]]:
    """Score, latency and cache reduction of every stage; for a text the score is its perplexity."""
    labelled = "acc" in records[0]["metrics"]
    rows = [
        {
            "label": one["stage"],
            **({"accuracy": 100 * one["metrics"]["acc"]} if labelled else {"perplexity": one["metrics"]["perplexity"]}),
            "latency": one["latency"]["decode_ms_per_token"]["median"],
            "reduction": 100 * one["kv_reduction"],
        }
        for one in records
    ]
    return (TRADEOFF[0] if labelled else PERPLEXITY, *TRADEOFF[1:]), rows


def metrics_of(records: Sequence[Record]) -> tuple[list[Measure], list[PictureRow]]:
    """What a heatmap shows of every stage."""
    first, rows = tradeoff(records)
    measures = [
        first[0],
        Measure("loss", "loss (nats)", lower=True, format=".3f"),
        Measure("ece", "ECE (%)", lower=True),
        Measure("example", "scoring (ms/example)", lower=True, format=".2f"),
        Measure("latency", "decoding (ms/token)", lower=True, format=".2f"),
        Measure("cache", "KV cache (B/token)", lower=True, format=",.0f"),
        Measure("weights", "weights (MB)", lower=True, format=",.2f"),
    ]
    for row, one in zip(rows, records, strict=True):
        ece = one["metrics"].get("ece")
        row["loss"] = one["metrics"]["loss"]
        row["ece"] = None if ece is None else 100 * ece
        row["example"] = one["latency"]["score_ms_per_example"]["median"]
        row["cache"], row["weights"] = one["kv_bytes_per_token"], one["model_bytes"] / 1e6
    return [one for one in measures if any(row[one.name] is not None for row in rows)], rows


def scores(records: Sequence[Record], series: str | None = None) -> tuple[list[PictureRow], Measure]:
    """Points for `pareto`: scores with 95 % intervals against cache; without a `series` each stage is one."""
    labelled = "acc" in records[0]["metrics"]
    measure = TRADEOFF[0] if labelled else PERPLEXITY
    rows = []
    for one in records:
        found = one["metrics"]
        value = 100 * found["acc"] if labelled else found["perplexity"]
        ends = [100 * end for end in found["acc_interval"]] if labelled else _around(value, found["perplexity_stderr"])
        row = {"series": series or one["stage"], "label": one["stage"], COST: 100 * (1 - one["kv_reduction"])}
        rows.append(row | {measure.name: value, f"{measure.name}_low": ends[0], f"{measure.name}_high": ends[1]})
    return rows, measure


def draw_front(path: Path, rows: Sequence[PictureRow], measure: Measure, note: str) -> None:
    """Scores against cache, and a line through those that no other equals or beats in both."""
    losses = measure.of(rows) * (1 if measure.lower else -1)
    best = [rows[at] for at in unbeaten(np.array([row[COST] for row in rows]), losses)]
    line = [{"series": "Pareto front", **{name: row[name] for name in ("label", COST, measure.name)}} for row in best]
    pareto(path, [*line, *rows], [(measure.name, measure.label)], COST, f"Bars: 95 % intervals. {note}")


def _around(value: float | None, error: float | None) -> list[float | None]:
    if value is None or error is None:  # not finite
        return [value, value]
    return [value - 1.96 * error, value + 1.96 * error]


def steps(run: SavedRun) -> list[PictureRow]:
    """A row per stage for the diagram: what it does in a few words, and its figures as text."""
    return [
        {
            "stage": one["stage"],
            "does": does(run, one["stage"]),
            "score": score(one),
            "KV cache": f"{one['kv_bytes_per_token']:,} B/token",
            "weights": f"{one['model_bytes']:,} B",
            "decoding": f"{one['latency']['decode_ms_per_token']['median']:.2f} ms/token",
        }
        for one in run.records
    ]


def does(run: SavedRun, stage: str) -> str:
    """What a stage does, by this run's plan and settings."""
    layers, config = run.plan.layers, run.config
    merged, fewer = [layer for layer in layers if layer.merged], [layer for layer in layers if layer.query_clusters]
    queries = f"queries of a key head in {len(fewer)} of {len(layers)} layers"
    heads = f"heads in {len(merged)} of {len(layers)} layers ({run.plan.share})"
    tiers = Counter(layer.tier for layer in layers)
    words = {
        "dense": f"the model as it was, {len(layers)} layers",
        "cluster": "merges " + ("; ".join([queries, *([heads] if merged else [])]) if fewer else heads),
        "distil": "learns from " + ("a larger teacher" if config.get("teacher") else "the dense model"),
        "quantize": f"stores by tier: {tiers['high']} high, {tiers['medium']} medium, {tiers['low']} low",
        "target": f"tunes some layers only ({config.get('policy')})",
    }
    if stage == "dense" and any(one["run_stage"] == "dense" for one in run.updates):
        return f"{words[stage]}, tuned on the task"
    return words.get(stage, "")
