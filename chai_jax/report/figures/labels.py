"""Names beside points, moved until none hides another."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from chai_jax.report.figures.draw import plain

# Where a label may stand, in points from its point: eight directions, near first.
DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
PLACES = [(far * x, far * y) for far in (14, 24, 36, 50, 66) for x, y in DIRECTIONS]


def label_points(axes: Axes, points: Float[np.ndarray, "N 2"], names: Sequence[str], size: float = 7) -> None:
    """Write each name in a white box near its point (data coordinates), with a line to it.

    Greedy: each takes the place that overlaps least with points and earlier labels and lies within the axes.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the transforms below hold only once the layout is done
    at = axes.transData.transform(points)
    frame, pixels = axes.get_window_extent(), figure.dpi / 72
    taken = [Bbox.from_bounds(x - 4 * pixels, y - 4 * pixels, 8 * pixels, 8 * pixels) for x, y in at]
    for (x, y), point, name in zip(at, points, names, strict=True):
        text = plain(name)
        wide, high = (0.62 * size * len(text) + 6) * pixels, (1.5 * size + 4) * pixels
        boxes = [_box(x + dx * pixels, y + dy * pixels, wide, high, dx, dy) for dx, dy in PLACES]
        best = min(range(len(boxes)), key=lambda i: (_hidden(boxes[i], taken, frame), i))
        taken.append(boxes[best])
        dx, dy = PLACES[best]
        axes.annotate(
            text,
            point,
            (dx, dy),
            textcoords="offset points",
            fontsize=size,
            ha=("right", "center", "left")[int(np.sign(dx)) + 1],
            va=("top", "center", "bottom")[int(np.sign(dy)) + 1],
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#888888", "linewidth": 0.6},
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.6},
            annotation_clip=False,
        ).set_in_layout(False)


def _box(x: float, y: float, wide: float, high: float, dx: float, dy: float) -> Bbox:
    return Bbox.from_bounds(x - wide * (1 - np.sign(dx)) / 2, y - high * (1 - np.sign(dy)) / 2, wide, high)


def _hidden(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """The area of `box` that lies over what is there, or outside the axes."""
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
    over = (Bbox.intersection(box, one) for one in taken)
    return outside + sum(one.width * one.height for one in over if one)
