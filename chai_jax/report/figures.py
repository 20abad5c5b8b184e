"""Pictures: PNG and SVG, with the numbers they show as CSV beside them. The only file that imports matplotlib."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from chai_jax.analyse.explain import explain
from chai_jax.files.atomic import new_file, write_text
from chai_jax.model.params import OPTConfig
from chai_jax.plans import Plan

DPI = 200
# Okabe and Ito's palette: told apart by colour-blind eyes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Row = dict[str, Any]


def save(figure: Figure, path: Path, rows: Sequence[Row]) -> list[Path]:
    """Write `path`.png, .svg and .csv (the rows); returns the three paths."""
    written = []
    for suffix in (".png", ".svg"):
        with new_file(path.with_name(path.name + suffix)) as temporary, temporary.open("wb") as file:
            figure.savefig(file, format=suffix[1:], dpi=DPI)
        written.append(path.with_name(path.name + suffix))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table = path.with_name(path.name + ".csv")
    write_text(table, buffer.getvalue())
    return [*written, table]


def head_maps(
    path: Path, plan: Plan, correlation: Float[np.ndarray, "L H H"], config: OPTConfig, caption: str = ""
) -> list[Path]:
    """How alike the heads of each layer attend, ordered by cluster, with each layer's clusters, tier and cache bytes.

    Args:
        path: of the files, without suffix.
        correlation: see `chai_jax.analyse.probe.Probe.correlation`.
    """
    layers, columns = len(plan.layers), min(6, len(plan.layers))
    lines = -(-layers // columns)
    figure = Figure(figsize=(2.3 * columns + 1, 2.6 * lines + 0.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    rows: list[Row] = []
    for index, (layer, about) in enumerate(zip(plan.layers, explain(plan, config), strict=False)):
        order = [head for one in layer.clusters for head in one.heads]
        axes[index].imshow(correlation[index][np.ix_(order, order)], cmap="cividis", vmin=0, vmax=1)
        edge = -0.5
        for one in layer.clusters:
            size = len(one.heads)
            axes[index].add_patch(_square(edge, size))
            edge += size
        axes[index].set_xticks(range(len(order)), [str(head) for head in order], fontsize=6)
        axes[index].set_yticks(range(len(order)), [str(head) for head in order], fontsize=6)
        axes[index].set_title(
            f"layer {index}: {about['clusters']} of {about['heads']}, {about['share']}\n"
            f"{about['tier']}, {about['kv_bytes_per_token']:,} B/token",
            fontsize=7,
        )
        rows += [
            {"layer": index, "head": a, "other": b, "correlation": round(float(correlation[index][a, b]), 6)}
            for a in order
            for b in order
        ]
    for empty in axes[layers:]:
        empty.set_axis_off()
    figure.colorbar(axes[0].images[0], ax=axes.tolist(), label="correlation of centred attention rows", shrink=0.8)
    figure.supxlabel(f"heads, ordered by cluster (boxes). {caption}".strip(), fontsize=7)
    return save(figure, path, rows)


def _square(edge: float, size: int) -> Rectangle:
    return Rectangle((edge, edge), size, size, fill=False, edgecolor=COLOURS[1], linewidth=1.5)


def pareto(path: Path, rows: Sequence[Row], panels: Sequence[tuple[str, str]], x: str, caption: str) -> list[Path]:
    """Points with error bars, one panel per measure, against what they cost.

    Args:
        rows: each with `series`, `label`, the cost `x`, and for each panel its value and `<name>_low`, `<name>_high`.
        panels: (name of the measure, label of its axis).
        x: the column of the cost, also the label of its axis.
    """
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    series = list(dict.fromkeys(row["series"] for row in rows))
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, one in enumerate(series):
            _points(axes, [row for row in rows if row["series"] == one], name, x, one, number)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(x)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.supxlabel(caption, fontsize=7)
    return save(figure, path, rows)


def _points(axes: Axes, rows: Sequence[Row], name: str, x: str, label: str, number: int) -> None:
    rows = sorted(rows, key=lambda row: row[x])
    value = np.asarray([row[name] for row in rows], float)
    low, high = (np.asarray([row[f"{name}_{end}"] for row in rows], float) for end in ("low", "high"))
    axes.errorbar(
        [row[x] for row in rows],
        value,
        yerr=np.stack([value - low, high - value]),
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle="-" if len(rows) > 1 else "none",
        markersize=4,
        linewidth=1,
        elinewidth=0.8,
        label=label,
    )
