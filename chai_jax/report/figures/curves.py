"""Curves: the loss of each training stage, and time against length, batch or anything else that grows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from chai_jax.report.figures.draw import (
    COLOURS,
    PictureRow,
    errorbars,
    plain,
    series_of,
    ticks_at,
    write_caption,
    write_picture,
)


def losses(path: Path, rows: Sequence[PictureRow], caption: str) -> list[Path]:
    """Loss against update, one panel per training stage: every update thin, their running mean (of a twentieth) thick.

    Args:
        path: of the files, without suffix.
        rows: each with `stage`, `step` (updates, from 1) and `loss` (nats per target), in order.
        caption: what stands under the picture: device, dtype, seed.
    """
    stages = series_of(rows, "stage")
    figure = Figure(figsize=(max(5.0, 4.0 * len(stages)), 3.6), layout="constrained")
    drawn: list[PictureRow] = []
    for axes, (stage, members) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        step = [row["step"] for row in members]
        loss = np.array([row["loss"] for row in members], float)
        width = max(1, len(members) // 20)
        mean = running_mean(loss, width)
        axes.plot(step, loss, color=COLOURS[5], linewidth=0.7 if width > 1 else 1.8, label="each update")
        if width > 1:
            axes.plot(step, mean, color=COLOURS[0], linewidth=1.8, label=f"mean of {width}")
        axes.set_title(plain(stage), fontsize=10)
        axes.set_xlabel("update")
        axes.set_ylabel("loss (nats/target)")
        axes.set_ylim(bottom=min(0.0, float(loss.min())))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        drawn += [
            {"stage": stage, "step": s, "loss": x, "running_mean": round(m, 6)}
            for s, x, m in zip(step, loss.tolist(), mean.tolist(), strict=True)
        ]
    write_caption(figure, caption)
    return write_picture(figure, path, drawn)


def running_mean(values: Float[np.ndarray, " N"], width: int) -> Float[np.ndarray, " N"]:
    """The mean of each value and the up to `width` - 1 before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / (end - start)


def cost_against(
    path: Path,
    rows: Sequence[PictureRow],
    caption: str,
    x: str = "prompt",
    x_label: str = "prompt (tokens)",
    y: str = "ms",
    y_label: str = "latency (ms)",
    series: str = "model",
    panel: str = "batch",
) -> list[Path]:
    """What something costs against what grows: one line per series, one panel per value of `panel`, log-log axes.

    Args:
        path: of the files, without suffix.
        rows: each with the columns `x`, `y`, `series`, `panel`, and `<y>_low`, `<y>_high` where the spread is known.
        caption: what stands under the picture: trials, device, dtype, what the bars are.
    """
    panels = series_of(rows, panel)
    colours = {name: number for number, name in enumerate(series_of(rows, series))}
    outside = len(colours) > 5  # names of so many would hide lines
    figure = Figure(figsize=(max(5.0, 4.0 * len(panels)) + 2.5 * outside, 4.0), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (value, members) in zip(every, panels.items(), strict=True):
        for name, line in series_of(members, series).items():
            errorbars(axes, line, x, y, name, colours[name])
        ticks_at(axes, [row[x] for row in members])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_title(plain(f"{panel} {value}"), fontsize=10)
        axes.set_xlabel(plain(x_label))
        axes.grid(alpha=0.3, which="both")
    every[0].set_ylabel(plain(y_label))
    if outside:
        every[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        every[0].legend(fontsize=8)
    write_caption(figure, caption)
    return write_picture(figure, path, rows)
