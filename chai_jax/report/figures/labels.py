"""Names beside points, moved until none hides another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from chai_jax.report.figures.draw import plain

# Where a label may stand, in points from its point: eight directions, near first.
DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
PLACES = [np.array([far * x, far * y]) for far in (16, 26, 38, 52, 68) for x, y in DIRECTIONS]
BOX = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#888888", "linewidth": 0.6}
LINE = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "zorder": 1}
FREE = 3  # pixels: points nearer to each other share a label


def label_points(
    axes: Axes, points: Float[np.ndarray, "N 2"], names: Sequence[str], size: float, radius: float
) -> None:
    """Write each name in a white box near its point (data coordinates), with a line to it; one box for equal points.

    Greedy: each takes the place that hides least of the points, tick labels, earlier boxes and their lines, and lies
    within the axes.

    Args:
        size: of the letters, in points.
        radius: of the drawn points, in points.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the transforms below hold only once the layout is done
    pixels = figure.dpi / 72
    at = axes.transData.transform(points)
    marks = [Bbox([spot - radius * pixels, spot + radius * pixels]) for spot in at]
    taken, lines = [*marks, *_tick_labels(axes)], np.zeros((0, 2))
    frame = axes.get_window_extent()
    for spot, point, name in _together(at, points, names):
        extent = np.array([0.62 * size * len(name) + 6, 1.5 * size + 4]) * pixels
        boxes = [_box(spot + place * pixels, extent, place) for place in PLACES]
        ways = [spot + _from(radius, place)[:, None] * place * pixels for place in PLACES]
        hidden = [_hidden(box, way, taken, lines, frame) for box, way in zip(boxes, ways, strict=True)]
        best = int(np.argmin(hidden))
        taken.append(boxes[best])
        lines = np.concatenate([lines, ways[best]])
        _write(axes, name, point, PLACES[best], size)


def _together(at: np.ndarray, points: np.ndarray, names: Sequence[str]) -> list[tuple[np.ndarray, Any, str]]:
    """Place, point and name; points that lie on each other once, with all their names."""
    found: list[tuple[np.ndarray, Any, str]] = []
    for spot, point, name in zip(at, points, names, strict=True):
        same = [i for i, (other, _, _) in enumerate(found) if np.hypot(*(spot - other)) < FREE]
        if same:
            found[same[0]] = (*found[same[0]][:2], f"{found[same[0]][2]}, {plain(name)}")
        else:
            found.append((spot, point, plain(name)))
    return found


def _from(radius: float, place: np.ndarray) -> np.ndarray:
    """Fractions of the way to a place, beginning at the edge of the point."""
    return np.linspace(min(1.0, 1.2 * radius / float(np.hypot(*place))), 1, 40)


def _tick_labels(axes: Any) -> list[Bbox]:
    names = [name for name in "xyz" if hasattr(axes, f"get_{name}ticklabels")]
    labels = [label for name in names for label in getattr(axes, f"get_{name}ticklabels")() if label.get_text()]
    return [label.get_window_extent() for label in labels]


def _box(corner: np.ndarray, extent: np.ndarray, place: np.ndarray) -> Bbox:
    low = corner - extent * (1 - np.sign(place)) / 2
    return Bbox([low, low + extent])


def _hidden(box: Bbox, way: np.ndarray, taken: Sequence[Bbox], lines: np.ndarray, frame: Bbox) -> float:
    """How much a box and the way to it hide, in pixels squared: what is there, lines, and what is outside the axes."""
    inside = Bbox.intersection(box, frame)
    area = box.width * box.height
    outside = area - (inside.width * inside.height if inside else 0.0)
    over = [one for one in (Bbox.intersection(box, other) for other in taken) if one]
    near = np.hypot(*(way[:, None] - lines).T) < FREE
    crossed = sum(one.count_contains(way) for one in taken) + box.count_contains(lines) + int(near.sum())
    return outside + sum(one.width * one.height for one in over) + 0.05 * area * crossed


def _write(axes: Axes, name: str, point: Any, place: np.ndarray, size: float) -> None:
    x, y = np.sign(place).astype(int) + 1
    note = axes.annotate(
        name,
        point,
        tuple(place),
        textcoords="offset points",
        fontsize=size,
        ha=("right", "center", "left")[x],
        va=("top", "center", "bottom")[y],
        bbox=BOX,
        arrowprops=LINE,
        annotation_clip=False,
    )
    note.set_in_layout(False)
