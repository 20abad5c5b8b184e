"""The pipeline as a diagram: a box per stage, what it did and what came out, from top to bottom."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from chai_jax.report.figures.draw import COLOURS, PictureRow, plain, write_caption, write_picture

HIGH, GAP = 0.74, 0.3  # inches: a box, and the arrow to the next
NAME, COLUMN = 2.9, 1.45  # inches: room for the stage's name and for each figure


def pipeline_diagram(path: Path, rows: Sequence[PictureRow], caption: str) -> list[Path]:
    """A box per row, joined by arrows: the stage's name, what it does, and its figures with their names.

    Args:
        path: of the files, without suffix.
        rows: each with `stage`, `does` (a few words) and further columns, which are written as they are.
        caption: what stands under the picture: n, device, dtype.
    """
    columns = [name for name in rows[0] if name not in ("stage", "does")]
    width, height = NAME + COLUMN * len(columns) + 0.1, len(rows) * (HIGH + GAP)
    figure = Figure(figsize=(width + 0.2, height + 0.15), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(-height, 0), aspect="equal")
    axes.set_axis_off()
    for at, row in enumerate(rows):
        top = -at * (HIGH + GAP) - 0.05
        _box(axes, row, columns, top, width - 0.1, COLOURS[at % len(COLOURS)])
        if at:
            axes.add_patch(
                FancyArrowPatch((0.6, top + GAP), (0.6, top), arrowstyle="-|>", mutation_scale=14, color="#444444")
            )
    write_caption(figure, caption)
    return write_picture(figure, path, rows)


def _box(axes: Axes, row: PictureRow, columns: Sequence[str], top: float, width: float, colour: str) -> None:
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((0.05, top - HIGH), width, HIGH, shape, facecolor="white", edgecolor=colour))
    axes.text(0.2, top - 0.27, plain(row["stage"]), fontsize=12, fontweight="bold", color=colour, va="center")
    axes.text(0.2, top - 0.53, plain(row["does"]), fontsize=8, color="#333333", va="center")
    for at, name in enumerate(columns):
        x = NAME + COLUMN * at
        axes.text(x, top - 0.24, plain(name), fontsize=7, color="#555555", va="center")
        axes.text(x, top - 0.5, plain(row[name]), fontsize=9, va="center")
