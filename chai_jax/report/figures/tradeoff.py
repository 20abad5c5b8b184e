"""Accuracy, latency and size at once: the radar, the cloud with its projections, and the Pareto panels."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import proj3d

from chai_jax.report.figures.draw import (
    TRADEOFF,
    Measure,
    PictureRow,
    errorbars,
    plain,
    series_of,
    style,
    ticks_at,
    write_caption,
    write_picture,
)
from chai_jax.report.figures.labels import label_points


def radar(path: Path, rows: Sequence[PictureRow], caption: str, measures: Sequence[Measure] = TRADEOFF) -> list[Path]:
    """One polygon per row; on each axis 1 is the best of the rows, and outside is better.

    Args:
        path: of the files, without suffix.
        rows: each with `label` and a value for every measure; None where there is none (drawn as 0).
        caption: what stands under the picture: n, device, dtype.
        measures: the axes, in their fixed order, the first at the top.
    """
    shares = np.stack([_share_of_best(one.of(rows), one.lower) for one in measures], axis=1)
    angles = 2 * np.pi * np.arange(len(measures) + 1) / len(measures)
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar", theta_offset=np.pi / 2, theta_direction=-1)
    for number, (row, share) in enumerate(zip(rows, shares, strict=True)):
        look = style(number)
        axes.plot(angles, [*share, share[0]], label=plain(row["label"]), linewidth=1.6, markersize=5, **look)
        axes.fill(angles, [*share, share[0]], color=look["color"], alpha=0.06)
    axes.set_xticks(angles[:-1], [_axis(measure, rows) for measure in measures], fontsize=8)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=False):
        label.set_ha(("right", "center", "left")[int(np.sign(np.round(np.sin(angle), 6))) + 1])
    axes.spines["polar"].set_visible(False)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0.25, 0.5, 0.75, 1], ["0.25", "0.5", "0.75", "1 = best"], fontsize=7)
    axes.set_rlabel_position(180 / len(measures))
    figure.legend(loc="outside right upper", fontsize=8)
    write_caption(figure, f"Each axis relative to the best of these rows; outside is better. {caption}")
    named = {one.name: shares[:, at] for at, one in enumerate(measures)}
    drawn = [
        {**row, **{f"{name}_of_best": round(float(share[at]), 6) for name, share in named.items()}}
        for at, row in enumerate(rows)
    ]
    return write_picture(figure, path, drawn)


def _share_of_best(values: np.ndarray, lower: bool) -> np.ndarray:
    """Values as fractions of the best: value / largest, or smallest / value; below 0, or where there is none, 0."""
    if np.isnan(values).all():
        return np.zeros(len(values))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nanmin(values) / values if lower else values / np.nanmax(values)
    return np.clip(np.nan_to_num(share, nan=0.0, posinf=0.0, neginf=0.0), 0, 1)


def _axis(measure: Measure, rows: Sequence[PictureRow]) -> str:
    values = measure.of(rows)
    label = plain(measure.label)
    if np.isnan(values).all():
        return label
    best = np.nanmin(values) if measure.lower else np.nanmax(values)
    return f"{label}\nbest: {best:{measure.format}}"


def scatter3d(
    path: Path,
    rows: Sequence[PictureRow],
    caption: str,
    measures: Sequence[Measure] = TRADEOFF,
    title: str = "Accuracy, latency and size",
) -> list[Path]:
    """The rows in space, coloured by the first measure, and beside it the three projections, since depth misleads.

    Args:
        path: of the files, without suffix.
        rows: each with `label` and a value for every measure; rows that lack one are left out.
        caption: what stands under the picture: n, device, dtype.
        measures: three; on the x, y and z axis.
    """
    rows = [row for row in rows if all(np.isfinite(one.of([row])[0]) for one in measures)]
    points = np.stack([one.of(rows) for one in measures], axis=1)
    names = [str(row["label"]) for row in rows]
    figure = Figure(figsize=(12.5, 7.6), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(2.1, 1))
    space: Any = figure.add_subplot(grid[:, 0], projection="3d")
    flat = [figure.add_subplot(grid[at, 1]) for at in range(3)]
    scale = Normalize(*_range(points[:, 0]))
    colours: dict[str, Any] = {"c": points[:, 0], "cmap": "plasma", "norm": scale}
    _space(space, points, measures, colours)
    for axes, (x, y) in zip(flat, combinations(range(3), 2), strict=True):
        axes.scatter(points[:, x], points[:, y], s=70, edgecolors="black", linewidths=0.8, **colours)
        _bold(axes, measures[x], measures[y])
    bar = figure.colorbar(ScalarMappable(scale, "plasma"), ax=space, shrink=0.6, location="left", pad=0.02)
    bar.set_label(plain(measures[0].label), fontweight="bold")
    figure.suptitle(plain(title), color="purple", fontweight="bold", fontsize=16)
    write_caption(figure, caption)
    figure.draw_without_rendering()
    seen = np.stack(proj3d.proj_transform(*points.T, space.get_proj())[:2], axis=1)
    label_points(space, seen, names, size=9.0, radius=9.0)
    for axes, (x, y) in zip(flat, combinations(range(3), 2), strict=True):
        label_points(axes, points[:, [x, y]], names, size=7.0, radius=5.0)
    return write_picture(
        figure, path, [{"label": row["label"], **{one.name: row[one.name] for one in measures}} for row in rows]
    )


def _range(values: np.ndarray) -> tuple[float, float]:
    """From the least to the greatest, with room on both sides, so that one point is in the middle; of none 0 to 1."""
    if not len(values):
        return 0.0, 1.0
    room = 0.08 * float(np.ptp(values)) or 0.5
    return float(values.min()) - room, float(values.max()) + room


def _space(axes: Any, points: np.ndarray, measures: Sequence[Measure], colours: dict[str, Any]) -> None:
    floor = _range(points[:, 2])[0]
    for x, y, z in points:
        axes.plot([x, x], [y, y], [floor, z], color="#888888", linewidth=0.8, linestyle=":")
    axes.scatter(*points.T, s=300, edgecolors="black", linewidths=1.5, depthshade=False, **colours)
    for name, measure, values in zip("xyz", measures, points.T, strict=True):
        getattr(axes, f"set_{name}lim")(*_range(values))
        getattr(axes, f"set_{name}label")(plain(measure.label), fontweight="bold", labelpad=8)
    axes.view_init(elev=22, azim=-55)
    axes.set_box_aspect(None, zoom=1.05)


def _bold(axes: Axes, x: Measure, y: Measure) -> None:
    axes.set_xlabel(plain(x.label), fontweight="bold", fontsize=8)
    axes.set_ylabel(plain(y.label), fontweight="bold", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.margins(0.2, 0.28)
    axes.grid(alpha=0.3)


def pareto(
    path: Path, rows: Sequence[PictureRow], panels: Sequence[tuple[str, str]], x: str, caption: str
) -> list[Path]:
    """Points with error bars, one panel per measure, against what they cost; those of one series are joined.

    Args:
        path: of the files, without suffix.
        rows: each with `series`, `label`, the cost `x`, and for each panel its value and, where there are error bars,
            `<name>_low`, `<name>_high`.
        panels: (name of the measure, label of its axis).
        x: the column of the cost, also the label of its axis.
        caption: what stands under the picture: n, what the bars are, device, dtype.
    """
    figure = Figure(figsize=(5.2 * len(panels) + 1.6, 4.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (series, members) in enumerate(series_of(rows, "series").items()):
            errorbars(axes, members, x, name, series, number)
        ticks_at(axes, [row[x] for row in rows])
        axes.set_xlabel(plain(x))
        axes.set_ylabel(plain(label))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    write_caption(figure, caption)
    return write_picture(figure, path, rows)


def unbeaten(costs: Float[np.ndarray, " N"], losses: Float[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """Which points no other equals or beats in both, by rising cost (the Pareto front; of equal points the first)."""
    order = np.lexsort((losses, costs))
    best = np.concatenate([[np.inf], np.minimum.accumulate(losses[order])[:-1]])
    return order[losses[order] < best]
