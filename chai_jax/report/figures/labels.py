"""Names beside points, moved until none hides another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from chai_jax.report.figures.draw import plain

# Where a label may stand, in points from its point: eight directions, near first.
DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
PLACES = [np.array([far * x, far * y]) for far in (16, 26, 38, 52, 68) for x, y in DIRECTIONS]
BOX = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#888888", "linewidth": 0.6}
LINE = {"arrowstyle": "-", "color": "#888888", "linewidth": 0.6, "zorder": 1}
FREE = 3  # pixels: points nearer to each other share a label

Box = Float[np.ndarray, "2 2"]  # lower left and upper right corner, in pixels
Boxes = Float[np.ndarray, "N 2 2"]


def label_points(
    axes: Axes, points: Float[np.ndarray, "N 2"], names: Sequence[str], size: float, radius: float
) -> None:
    """Write each name in a white box near its point (data coordinates), with a line to it; one box for equal points.

    The figure must have been laid out (`draw_without_rendering`). Greedy: each takes the place that hides least of the
    points, tick labels, earlier boxes and their lines, and lies within the axes.

    Args:
        size: of the letters, in points.
        radius: of the drawn points, in points.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixels, frame = figure.dpi / 72, axes.get_window_extent().get_points()
    at = axes.transData.transform(points)
    marks = np.stack([at - radius * pixels, at + radius * pixels], axis=1)
    taken, lines = np.concatenate([marks, _tick_labels(axes)]), np.zeros((0, 2))
    for spot, point, name in _together(at, points, names):
        extent = np.array([0.62 * size * len(name) + 6, 1.5 * size + 4]) * pixels
        boxes = [_box(spot + place * pixels, extent, place) for place in PLACES]
        ways = [spot + _from(radius, place)[:, None] * place * pixels for place in PLACES]
        hidden = [_hidden(box, way, taken, lines, frame) for box, way in zip(boxes, ways, strict=True)]
        best = int(np.argmin(hidden))
        taken, lines = np.concatenate([taken, boxes[best][None]]), np.concatenate([lines, ways[best]])
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


def _tick_labels(axes: Any) -> Boxes:
    names = [name for name in "xyz" if hasattr(axes, f"get_{name}ticklabels")]
    labels = [label for name in names for label in getattr(axes, f"get_{name}ticklabels")() if label.get_text()]
    return np.array([label.get_window_extent().get_points() for label in labels]).reshape(-1, 2, 2)


def _box(corner: np.ndarray, extent: np.ndarray, place: np.ndarray) -> Box:
    low = corner - extent * (1 - np.sign(place)) / 2
    return np.stack([low, low + extent])


def _from(radius: float, place: np.ndarray) -> np.ndarray:
    """Fractions of the way to a place, beginning at the edge of the point."""
    return np.linspace(min(1.0, 1.2 * radius / float(np.hypot(*place))), 1, 40)


def _hidden(box: Box, way: np.ndarray, taken: Boxes, lines: np.ndarray, frame: Box) -> float:
    """How much a box and the way to it hide, in pixels squared: what is there, lines, and what is outside the axes."""
    area = float(np.prod(box[1] - box[0]))
    outside = area - float(overlap(box, frame[None]).sum())
    near = np.hypot(*(way[:, None] - lines).T) < FREE
    crossed = _inside(way, taken).sum() + _inside(lines, box[None]).sum() + near.sum()
    return outside + float(overlap(box, taken).sum()) + 0.15 * area * float(crossed)


def overlap(box: Box, others: Boxes) -> Float[np.ndarray, " N"]:
    """The area that a box shares with each of the others."""
    sides = np.minimum(box[1], others[:, 1]) - np.maximum(box[0], others[:, 0])
    return np.prod(np.maximum(sides, 0), axis=1)


def _inside(points: np.ndarray, boxes: Boxes) -> np.ndarray:
    """Which points lie in which boxes."""
    low, high = boxes[:, 0], boxes[:, 1]
    return np.all((points[:, None] > low) & (points[:, None] < high), axis=-1)


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
