"""A table one can see: rows by measures, coloured by what each gained or lost."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from chai_jax.report.figures.draw import TRADEOFF, Measure, PictureRow, plain, write_caption, write_picture


def heatmap(
    path: Path, rows: Sequence[PictureRow], caption: str, measures: Sequence[Measure] = TRADEOFF, title: str = ""
) -> list[Path]:
    """Cells with their values, coloured by the change from the first row: red is worse, blue is better.

    Units differ from column to column, so each column has a scale of its own: its largest change is the full colour.

    Args:
        path: of the files, without suffix.
        rows: each with `label` and a value for every measure, None for an empty cell; the first is compared with.
        caption: what stands under the picture: n, device, dtype.
        measures: the columns: metrics, or tasks (`Measure("sst2", "SST-2 (%)")`).
    """
    values = np.stack([one.of(rows) for one in measures], axis=1)
    worse = worsening(values, [one.lower for one in measures])
    figure = Figure(figsize=(2.6 + 1.35 * len(measures), 1.9 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#dddddd")
    image = axes.imshow(np.ma.masked_invalid(worse), cmap="coolwarm", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:{measures[column].format}}"
        colour = "white" if abs(worse[row, column]) > 0.75 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(measures)), [plain(one.label).replace(" (", "\n(") for one in measures], fontsize=8)
    axes.set_yticks(range(len(rows)), [plain(row["label"]) for row in rows], fontsize=9)
    axes.set_xticks(np.arange(-0.5, len(measures)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    if title:
        axes.set_title(plain(title), fontsize=10)
    bar = figure.colorbar(image, ax=axes, ticks=(-1, 0, 1))
    bar.ax.set_yticklabels(["better", plain(f"as {rows[0]['label']}"), "worse"], fontsize=8)
    write_caption(figure, f"Colour: change from the first row, as a share of the column's largest. {caption}")
    return write_picture(figure, path, [_drawn(row, line, measures) for row, line in zip(rows, worse, strict=True)])


def worsening(values: Float[np.ndarray, "N M"], lower: Sequence[bool]) -> Float[np.ndarray, "N M"]:
    """How much worse each value is than the first of its column, as a share of the column's largest change."""
    change = (values - values[0]) * np.where(lower, 1, -1)
    largest = np.nanmax(np.abs(np.where(np.isnan(change), 0, change)), axis=0)
    return change / np.where(largest > 0, largest, 1)


def _drawn(row: PictureRow, line: np.ndarray, measures: Sequence[Measure]) -> PictureRow:
    cells = {one.name: row.get(one.name) for one in measures}
    shades = {f"{one.name}_worse": round(float(shade), 6) for one, shade in zip(measures, line, strict=True)}
    return {"label": row["label"], **cells, **shades}
