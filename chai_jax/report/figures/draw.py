"""What all pictures share: colours, measures, captions, and the three files each is saved as."""

import csv
import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chai_jax.files.atomic import new_file, write_text
from chai_jax.report.text import printable

DPI = 200
# Okabe and Ito's palette: told apart by colour-blind eyes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")
CHARACTERS_PER_INCH = 16  # of a caption

PictureRow = dict[str, Any]  # one line of the .csv beside a picture


@dataclass(frozen=True)
class Measure:
    """A column of rows that is drawn: its name, the label of its axis (with the unit), and which end is the better.

    Attributes:
        format: of a value, for notes in the picture.
    """

    name: str
    label: str
    lower: bool = False
    format: str = ".1f"

    def of(self, rows: Sequence[PictureRow]) -> np.ndarray:
        """The column, float64; nan where a row has none."""
        return np.array([np.nan if row.get(self.name) is None else row[self.name] for row in rows], float)


# What a compressed model is judged by; rows hold the values in these units.
TRADEOFF = (
    Measure("accuracy", "accuracy (%)"),
    Measure("latency", "latency (ms/token)", lower=True, format=".2f"),
    Measure("reduction", "KV cache reduction (%)"),
)


def write_picture(figure: Figure, path: Path, rows: Sequence[PictureRow]) -> list[Path]:
    """Write `path`.png, .svg and .csv (the rows); returns the three paths. The same picture gives the same bytes."""
    written = []
    with mpl.rc_context({"svg.hashsalt": "chai_jax"}), warnings.catch_warnings():
        # A name in a script that the font has not: boxes are drawn, and the page beside has the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out: once is enough for both files
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            with new_file(path.with_name(path.name + suffix)) as temporary, temporary.open("wb") as file:
                figure.savefig(file, format=suffix[1:], dpi=DPI, metadata=metadata)
            written.append(path.with_name(path.name + suffix))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table = path.with_name(path.name + ".csv")
    write_text(table, buffer.getvalue())
    return [*written, table]


def plain(text: object) -> str:
    """Text as it stands, in one line: no mathematics between dollars, nothing that cannot be printed."""
    return printable(text).replace("\n", " ").replace("$", r"\$")


def write_caption(figure: Figure, text: str) -> None:
    """A small note under the picture, in as many lines as it needs."""
    width = int(CHARACTERS_PER_INCH * figure.get_figwidth())
    figure.supxlabel("\n".join(textwrap.wrap(plain(text), width)), fontsize=7)


def ticks_at(axes: Axes, values: Sequence[int | float]) -> None:
    """Label a logarithmic x axis, base 2, at the values themselves where they are few and far enough apart."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.4g}")
    apart: list[int | float] = []
    for value in sorted(values):
        if not apart or value > 1.15 * apart[-1]:
            apart.append(value)
    if len(apart) <= 8 and apart[0] > 0:
        axes.set_xticks(apart)
        axes.minorticks_off()


def series_of(rows: Sequence[PictureRow], name: str) -> dict[str, list[PictureRow]]:
    """Rows by their value of a column, in the order of appearance."""
    found: dict[str, list[PictureRow]] = {}
    for row in rows:
        found.setdefault(str(row[name]), []).append(row)
    return found


def style(number: int) -> dict[str, Any]:
    """Colour, marker and line of a series; the first 49 differ by colour and marker alone, as lone points must."""
    turn = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + turn) % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
    }


def errorbars(
    axes: Axes, rows: Sequence[PictureRow], x: str, y: str, label: str, number: int, joined: bool = True
) -> None:
    """One series with its error bars from `<y>_low` to `<y>_high`, where rows have them."""
    rows = sorted(rows, key=lambda row: row[x])
    value = np.array([row[y] for row in rows], float)
    ends = [np.array([row.get(f"{y}_{end}", row[y]) for row in rows], float) for end in ("low", "high")]
    look = style(number)
    if not joined or len(rows) == 1:
        look["linestyle"] = "none"
    axes.errorbar(
        [row[x] for row in rows],
        value,
        yerr=np.stack([value - ends[0], ends[1] - value]),
        markersize=4,
        linewidth=1,
        elinewidth=0.8,
        label=plain(label),
        **look,
    )
