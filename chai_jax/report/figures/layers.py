"""Layer by layer: how alike the heads are, and how sensitive each layer is."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from chai_jax.analyse.explain import explain
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import Plan
from chai_jax.report.figures.draw import (
    COLOURS,
    PictureRow,
    errorbars,
    plain,
    series_of,
    write_caption,
    write_picture,
)

# Colour and hatch of each tier: told apart in print without colours too.
TIER_LOOKS = {"high": (COLOURS[1], "//"), "medium": (COLOURS[4], ".."), "low": (COLOURS[0], "")}


def head_maps(
    path: Path, plan: Plan, correlation: Float[np.ndarray, "L H H"], config: Architecture, caption: str = ""
) -> list[Path]:
    """How alike each layer's key/value heads attend, ordered by cluster, with its clusters, tier and cache bytes.

    Args:
        path: of the files, without suffix.
        correlation: see `chai_jax.analyse.probe.Probe.correlation`.
    """
    clusters, titles = [], []
    for index, (layer, about) in enumerate(zip(plan.layers, explain(plan, config), strict=False)):
        clusters.append([one.heads for one in layer.clusters])
        queries = f", {about['queries']['kept']}/{about['queries']['of']} queries" if "queries" in about else ""
        titles.append(
            f"layer {index}: {about['clusters']} of {about['heads']}, {about['share']}{queries}\n"
            f"{about['tier']}, {about['kv_bytes_per_token']:,} B/token"
        )
    caption = f"Key/value heads, ordered by cluster (boxes). {caption}"
    return _maps(path, correlation, clusters, titles, caption)


def pair_maps(path: Path, correlation: Float[np.ndarray, "L Q Q"], queries: int, caption: str) -> list[Path]:
    """How alike each layer's query heads attend; boxes are around those that read one key head.

    Args:
        path: of the files, without suffix.
        queries: heads that read one key head.
    """
    heads = range(correlation.shape[1])
    groups = [tuple(heads[at : at + queries]) for at in heads[::queries]]
    titles = [f"layer {index}" for index in range(len(correlation))]
    return _maps(path, correlation, [groups] * len(correlation), titles, caption)


def _maps(
    path: Path,
    correlation: Float[np.ndarray, "L H H"],
    groups: Sequence[Sequence[Sequence[int]]],
    titles: Sequence[str],
    caption: str,
) -> list[Path]:
    """A panel a layer, its heads in the order of their groups, which have boxes."""
    layers, columns = len(groups), min(6, len(groups))
    lines = -(-layers // columns)
    figure = Figure(figsize=(2.3 * columns + 1, 2.6 * lines + 0.3), layout="constrained")
    every = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    rows: list[PictureRow] = []
    for index, (axes, members, title) in enumerate(zip(every, groups, titles, strict=False)):
        order = [head for group in members for head in group]
        axes.imshow(correlation[index][np.ix_(order, order)], cmap="cividis", vmin=0, vmax=1)
        edge = -0.5
        for group in members:
            axes.add_patch(_square(edge, len(group)))
            edge += len(group)
        axes.set_xticks(range(len(order)), [str(head) for head in order], fontsize=6)
        axes.set_yticks(range(len(order)), [str(head) for head in order], fontsize=6)
        axes.set_title(title, fontsize=7)
        rows += [
            {"layer": index, "head": a, "other": b, "correlation": round(float(correlation[index][a, b]), 6)}
            for a in order
            for b in order
        ]
    for empty in every[layers:]:
        empty.set_axis_off()
    figure.colorbar(every[0].images[0], ax=every.tolist(), label="correlation of attention", shrink=0.8)
    write_caption(figure, caption)
    return write_picture(figure, path, rows)


def _square(edge: float, size: int) -> Rectangle:
    return Rectangle((edge, edge), size, size, fill=False, edgecolor=COLOURS[1], linewidth=1.5)


def sensitivity(path: Path, rows: Sequence[PictureRow], caption: str, label: str = "sensitivity") -> list[Path]:
    """The score of every layer as a bar in the colour of its tier; one panel per `series` (a task, say).

    Args:
        path: of the files, without suffix.
        rows: each with `layer`, `sensitivity`, `tier` (high, medium, low) and, for several panels, `series`.
        caption: what stands under the picture: method, calibration tokens, device, dtype.
        label: of the axis, with the unit.
    """
    panels = series_of([{"series": "", **row} for row in rows], "series")
    longest = max(map(len, panels.values()))
    figure = Figure(figsize=(max(5.0, 0.32 * longest + 2), 2.9 * len(panels) + 0.4), layout="constrained")
    for axes, (name, members) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        for tier, (colour, hatch) in TIER_LOOKS.items():
            chosen = [row for row in members if row["tier"] == tier]
            bars = axes.bar(
                [row["layer"] for row in chosen],
                [row["sensitivity"] for row in chosen],
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=f"{tier} ({len(chosen)})",
            )
            axes.bar_label(bars, fmt="%.2g", fontsize=6, padding=2, rotation=90 if longest > 12 else 0)
        axes.set_xticks([row["layer"] for row in members])
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylabel(plain(label))
        axes.set_title(plain(name), fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(y=0.18)
    figure.axes[-1].set_xlabel("layer")
    figure.axes[0].legend(title="tier", fontsize=8, title_fontsize=8)
    write_caption(figure, caption)
    return write_picture(figure, path, rows)


def by_layer(path: Path, rows: Sequence[PictureRow], caption: str) -> list[Path]:
    """What changes from layer to layer: a panel each, lines of several series.

    Args:
        path: of the files, without suffix.
        rows: each with `what` (the panel, which names its unit), `series`, `layer` and `value`.
        caption: what stands under the picture: calibration tokens, device.
    """
    panels = series_of(rows, "what")
    figure = Figure(figsize=(7.5, 2.9 * len(panels) + 0.3), layout="constrained")
    for axes, (what, members) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        for number, (name, line) in enumerate(series_of(members, "series").items()):
            errorbars(axes, line, "layer", "value", name, number)
        axes.set_title(plain(what), fontsize=10)
        axes.set_xlim(left=-0.5)
        axes.set_ylim(bottom=min(0.0, *(row["value"] for row in members)))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.axes[-1].set_xlabel("layer")
    write_caption(figure, caption)
    return write_picture(figure, path, rows)


def spectrum(path: Path, rows: Sequence[PictureRow], caption: str) -> list[Path]:
    """How much of a layer's keys or values each rank holds: a panel each, a line a layer, dark for early layers.

    Args:
        path: of the files, without suffix.
        rows: each with `what` (keys, values), `layer`, `rank` (from 1) and `energy` (share of the squared singular
            values held, from 0 to 1).
        caption: what stands under the picture: calibration tokens, device.
    """
    panels = series_of(rows, "what")
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    for axes, (what, members) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        layers = series_of(members, "layer")
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
        for (layer, ranks), colour in zip(layers.items(), colours, strict=True):
            lost = [max(1 - row["energy"], 1e-6) for row in ranks]
            axes.plot([row["rank"] for row in ranks], lost, color=colour, linewidth=1.3, label=f"layer {layer}")
        axes.axhline(0.01, color="black", linewidth=0.7, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-5)
        axes.set_xlabel("dimensions")
        axes.set_ylabel("energy not held (dotted: 1 %)")
        axes.set_title(plain(what), fontsize=10)
        axes.grid(alpha=0.3)
    if len(layers) <= 16:
        figure.axes[-1].legend(fontsize=7)
    write_caption(figure, caption)
    return write_picture(figure, path, rows)
