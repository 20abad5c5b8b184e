"""Pictures hold what they were given, in three formats, and nothing in them hides anything else."""

import csv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.transforms import Bbox

from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.report.figures import (
    Measure,
    by_layer,
    cost_against,
    head_maps,
    heatmap,
    losses,
    pair_maps,
    pareto,
    pipeline_diagram,
    radar,
    scatter3d,
    sensitivity,
    spectrum,
    unbeaten,
)
from chai_jax.report.figures.cells import worsening
from chai_jax.report.figures.curves import running_mean
from chai_jax.report.figures.draw import COLOURS, style
from chai_jax.report.figures.labels import label_points

CONFIG = Architecture(64, 32, 2, 4, 64, 24, 32)
PNG = b"\x89PNG\r\n\x1a\n"
STAGES = [
    {"label": "dense $x_{", "accuracy": 80.0, "latency": 2.0, "reduction": 0.0},
    {"label": "small", "accuracy": 60.0, "latency": 1.0, "reduction": 50.0},
    {"label": "smaller", "accuracy": 40.0, "latency": 1.5, "reduction": 75.0},
]


def texts(svg: Path) -> int:
    """How many drawn things the SVG groups: it parses, and is not empty."""
    return sum(element.tag.endswith("}g") for element in ElementTree.parse(svg).iter())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def drawn(files: list[Path]) -> list[dict[str, str]]:
    """The numbers beside a picture, which was drawn."""
    png, svg, table = files
    assert png.read_bytes().startswith(PNG)
    assert texts(svg) > 20
    return rows_of(table)


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that were saved, whose axes and artists can be looked at."""
    saved: list[Figure] = []
    real = Figure.savefig

    def keep(figure: Figure, *where: Any, **how: Any) -> None:
        if figure not in saved:
            saved.append(figure)
        real(figure, *where, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def points(axes: Any) -> dict[str, list[list[float]]]:
    """The points of each line that has a name in the legend."""
    handles, names = axes.get_legend_handles_labels()
    lines = [handle if hasattr(handle, "get_xydata") else handle.lines[0] for handle in handles]
    return {name: line.get_xydata().tolist() for name, line in zip(names, lines, strict=True)}


def test_head_maps_are_ordered_by_cluster(tmp_path: Path, figures: list[Figure]) -> None:
    correlation = np.random.default_rng(0).random((2, 4, 4))
    clusters = (ClusterPlan((1, 3), 1), ClusterPlan((0,), 0), ClusterPlan((2,), 2))
    rows = drawn(head_maps(tmp_path / "heads", Plan((LayerPlan(clusters),) * 2), correlation, CONFIG, "n = 7"))
    order = [1, 3, 0, 2]
    *maps, _ = figures[0].axes  # and the bar of colours
    for layer, axes in enumerate(maps):
        np.testing.assert_array_equal(axes.images[0].get_array(), correlation[layer][np.ix_(order, order)])
        assert [label.get_text() for label in axes.get_xticklabels()] == [str(head) for head in order]
        boxes = [(box.get_x(), box.get_y(), box.get_width(), box.get_height()) for box in axes.patches]
        assert boxes == [(-0.5, -0.5, 2, 2), (1.5, 1.5, 1, 1), (2.5, 2.5, 1, 1)]
    assert len(maps) == 2
    assert [int(row["head"]) for row in rows[:16:4]] == [1, 3, 0, 2]
    for row in rows:
        at = tuple(int(row[name]) for name in ("layer", "head", "other"))
        assert float(row["correlation"]) == pytest.approx(correlation[at], abs=1e-6)


def test_pareto_shows_every_row(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        {
            "series": s,
            "label": f"{s}{i}",
            "cache %": 2.0**i,
            "acc": i / 10,
            "acc_low": i / 10 - 0.1,
            "acc_high": i / 10 + 0.2,
        }
        for s in ("clusters", "latent")
        for i in range(3)
    ]
    found = drawn(pareto(tmp_path / "pareto", rows, [("acc", "accuracy")], "cache %", "n = 3"))
    assert [row["label"] for row in found] == [row["label"] for row in rows]
    (axes,) = figures[0].axes
    assert points(axes) == {s: [[1, 0], [2, 0.1], [4, 0.2]] for s in ("clusters", "latent")}
    assert axes.get_xscale() == "log"
    for bars in axes.containers:
        ends = [end[:, 1] for end in bars[2][0].get_segments()]
        np.testing.assert_allclose(ends, [[-0.1, 0.2], [0, 0.3], [0.1, 0.4]], atol=1e-12)


def test_the_front_is_what_nothing_beats() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        costs, losses = draw.integers(0, 6, (2, 12)).astype(float)

        def beaten(at: int, costs: np.ndarray = costs, losses: np.ndarray = losses) -> bool:
            as_good = (costs <= costs[at]) & (losses <= losses[at])
            return bool((as_good & ((costs < costs[at]) | (losses < losses[at]))).any())

        expected = {(costs[at], losses[at]) for at in range(12) if not beaten(at)}
        front = unbeaten(costs, losses)
        assert [(costs[at], losses[at]) for at in front] == sorted(expected)


def test_radar_is_relative_to_the_best(tmp_path: Path, figures: list[Figure]) -> None:
    rows = drawn(radar(tmp_path / "radar", [*STAGES, {"label": "unmeasured"}], "n = 3"))
    assert column(rows, "accuracy_of_best") == [1, 0.75, 0.5, 0]
    assert column(rows, "latency_of_best") == pytest.approx([0.5, 1, 2 / 3, 0], abs=1e-6)
    assert column(rows, "reduction_of_best") == pytest.approx([0, 2 / 3, 1, 0], abs=1e-6)
    (axes,) = figures[0].axes
    for row, line in zip(rows, axes.lines, strict=True):
        angles, shares = line.get_xydata().T
        np.testing.assert_allclose(angles, 2 * np.pi * np.arange(4) / 3)
        names = ("accuracy", "latency", "reduction", "accuracy")
        np.testing.assert_allclose(shares, [float(row[f"{name}_of_best"]) for name in names], atol=1e-6)


def test_radar_where_nothing_was_gained(tmp_path: Path) -> None:
    rows = drawn(radar(tmp_path / "radar", [{**row, "reduction": 0.0} for row in STAGES], "n = 3"))
    assert column(rows, "reduction_of_best") == [0, 0, 0]


def test_heatmap_compares_with_the_first_row(tmp_path: Path, figures: list[Figure]) -> None:
    rows = drawn(heatmap(tmp_path / "heat", [*STAGES, {"label": "no score", "latency": 3.0}], "n = 3"))
    assert column(rows, "accuracy_worse")[:3] == [0, 0.5, 1]
    assert column(rows, "latency_worse") == [0, -1, -0.5, 1]
    assert column(rows, "reduction_worse")[:3] == pytest.approx([0, -2 / 3, -1], abs=1e-6)
    assert rows[3]["accuracy"] == ""
    axes = figures[0].axes[0]
    shades = [column(rows[:3], f"{name}_worse") for name in ("accuracy", "latency", "reduction")]
    np.testing.assert_allclose(axes.images[0].get_array()[:3], np.transpose(shades), atol=1e-6)
    cells = [text.get_text() for text in axes.texts]
    assert cells[:6] == ["80.0", "2.00", "0.0", "60.0", "1.00", "50.0"]
    assert cells[-3:] == ["-", "3.00", "-"]


def test_a_column_that_does_not_change_has_no_colour() -> None:
    assert (worsening(np.full((3, 2), 5.0), [True, False]) == 0).all()


def test_the_cloud_leaves_out_what_it_cannot_place(tmp_path: Path, figures: list[Figure]) -> None:
    rows = drawn(scatter3d(tmp_path / "cloud", [*STAGES, {"label": "no score", "latency": 3.0}], "n = 3"))
    assert [row["label"] for row in rows] == [row["label"] for row in STAGES]
    assert column(rows, "latency") == [2, 1, 1.5]
    space, *flat, _ = figures[0].axes  # and the bar of colours
    cloud = np.stack(space.collections[0]._offsets3d)
    np.testing.assert_array_equal(cloud, [column(rows, name) for name in ("accuracy", "latency", "reduction")])
    for axes, pair in zip(flat, ([0, 1], [0, 2], [1, 2]), strict=True):
        np.testing.assert_array_equal(axes.collections[0].get_offsets().T, cloud[pair])


def test_losses_with_their_running_mean(tmp_path: Path, figures: list[Figure]) -> None:
    curve = [{"stage": s, "step": i, "loss": i + at} for at, s in enumerate(("distil", "target")) for i in range(1, 41)]
    rows = drawn(losses(tmp_path / "losses", curve, "seed 0"))
    assert column(rows, "loss") == [row["loss"] for row in curve]
    assert column(rows, "running_mean")[:3] == [1, 1.5, 2.5]
    assert column(rows, "running_mean")[40:43] == [2, 2.5, 3.5]
    assert [axes.get_title() for axes in figures[0].axes] == ["distil", "target"]
    for at, axes in enumerate(figures[0].axes):
        lines = points(axes)
        assert lines["each update"] == [[i, i + at] for i in range(1, 41)]
        assert lines["mean of 2"][:3] == [[1, 1 + at], [2, 1.5 + at], [3, 2.5 + at]]


def test_running_mean_is_the_convolution() -> None:
    values = np.random.default_rng(0).random(30)
    found = running_mean(values, 7)
    np.testing.assert_allclose(found[6:], np.convolve(values, np.ones(7) / 7, "valid"))
    np.testing.assert_allclose(found[:6], [values[: at + 1].mean() for at in range(6)])


def test_sensitivity_has_a_panel_for_each_series(tmp_path: Path, figures: list[Figure]) -> None:
    """A bar for each layer, as high as its score, in the colour of its tier."""
    bars = [
        {"series": task, "layer": at, "sensitivity": at / 4 + more, "tier": tier}
        for task, more in (("sst2", 1.0), ("rte", 0.0))
        for at, tier in enumerate(("low", "medium", "high"))
    ]
    drawn(sensitivity(tmp_path / "layers", bars, "n = 5", "KL (nats/token)"))
    assert [axes.get_title() for axes in figures[0].axes] == ["sst2", "rte"]
    for axes, more in zip(figures[0].axes, (1.0, 0.0), strict=True):
        found = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches)
        np.testing.assert_allclose(found, [(0, more), (1, more + 0.25), (2, more + 0.5)])
        colours = {group.get_label(): to_hex(group[0].get_facecolor()).upper() for group in axes.containers}
        assert colours == {"high (1)": COLOURS[1], "medium (1)": COLOURS[4], "low (1)": COLOURS[0]}
        assert axes.get_ylabel() == "KL (nats/token)"


def test_cost_against_length(tmp_path: Path, figures: list[Figure]) -> None:
    """A panel for each batch, in it a line with bars for each model."""
    rows = [
        {"prompt": prompt, "batch": batch, "model": model, "ms": prompt * batch * more, "ms_low": 1.0, "ms_high": 9e4}
        for prompt in (32, 512)
        for batch in (1, 8)
        for model, more in (("dense", 2), ("small", 1))
    ]
    drawn(cost_against(tmp_path / "cost", rows, "n = 9"))
    assert [axes.get_title() for axes in figures[0].axes] == ["batch 1", "batch 8"]
    for axes, batch in zip(figures[0].axes, (1, 8), strict=True):
        lines = {model: [[at, at * batch * more] for at in (32, 512)] for model, more in (("dense", 2), ("small", 1))}
        assert points(axes) == lines
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        for bars in axes.containers:
            assert [end[:, 1].tolist() for end in bars[2][0].get_segments()] == [[1, 9e4]] * 2


def test_the_diagram_has_every_stage(tmp_path: Path, figures: list[Figure]) -> None:
    """From top to bottom, a box each with its words, and an arrow from each to the next."""
    boxes = [{"stage": row["label"], "does": "$something_", "score": "1 ± 2 %"} for row in STAGES]
    drawn(pipeline_diagram(tmp_path / "steps", boxes, "n = 3"))
    (axes,) = figures[0].axes
    kinds = [type(patch) for patch in axes.patches]
    assert (kinds.count(FancyBboxPatch), kinds.count(FancyArrowPatch)) == (3, 2)
    height = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert height[r"dense \$x_{"] > height["small"] > height["smaller"]
    written = [text.get_text() for text in axes.texts]
    assert written.count(r"\$something_") == written.count("score") == written.count("1 ± 2 %") == 3


def test_the_same_picture_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = (heatmap(tmp_path / name, STAGES, "n = 3") for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("text", ["$\\frac$", "a\x00b\n", "\ud800", "三 🙂"])
def test_any_text_can_be_drawn(tmp_path: Path, text: str) -> None:
    """No mathematics, no broken SVG, no complaint about letters that the font has not."""
    png, svg, _ = heatmap(tmp_path / "heat", STAGES, text, title=text)
    assert png.read_bytes().startswith(PNG)
    assert texts(svg) > 20


@pytest.mark.parametrize(("spread", "expected"), [(1.0, 6), (0.1, 6), (0.0, 1)])
def test_labels_do_not_hide_each_other(spread: float, expected: int) -> None:
    """By the extents that matplotlib measures, of which the placing knows only an estimate."""
    points = spread * np.random.default_rng(1).random((6, 2))
    figure = Figure(figsize=(6, 5))
    axes = figure.subplots()
    axes.scatter(*points.T)
    axes.margins(0.3)
    figure.draw_without_rendering()
    label_points(axes, points, [f"stage {at}" for at in range(6)], 8.0, 4.0)
    figure.draw_without_rendering()
    patches = [note.get_bbox_patch() for note in axes.texts]
    boxes = [patch.get_window_extent() for patch in patches if patch is not None]
    assert len(boxes) == expected
    for at, one in enumerate(boxes):
        assert not any(Bbox.intersection(one, other) for other in boxes[:at])


def test_a_measure_of_rows_without_it() -> None:
    found = Measure("x", "x").of([{"x": 1}, {}, {"x": None}])
    assert found[0] == 1
    assert np.isnan(found[1:]).all()


def test_series_differ_by_colour_and_marker_alone() -> None:
    """A series of one point has no line to tell it by."""
    assert len({(look["color"], look["marker"]) for look in map(style, range(49))}) == 49


def test_a_spectrum_has_a_panel_for_keys_and_one_for_values(tmp_path: Path, figures: list[Figure]) -> None:
    """A line for each layer: what its ranks do not hold, on logarithmic axes."""
    rows = [
        {"what": what, "layer": layer, "rank": rank, "energy": 1 - base ** (rank + layer)}
        for what, base in (("keys", 0.5), ("values", 0.25))
        for layer in range(2)
        for rank in range(1, 5)
    ]
    drawn(spectrum(tmp_path / "spectrum", rows, "a caption"))
    assert [axes.get_title() for axes in figures[0].axes] == ["keys", "values"]
    for axes, base in zip(figures[0].axes, (0.5, 0.25), strict=True):
        lines = {f"layer {layer}": [[rank, base ** (rank + layer)] for rank in range(1, 5)] for layer in range(2)}
        assert points(axes) == lines
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_what_changes_by_layer_has_a_panel_each_and_a_line_each(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        {"what": what, "series": series, "layer": layer, "value": layer * slope}
        for what, slope in (("sinks", 0.25), ("dimensions", -8.0))
        for series in ("keys", "values")
        for layer in range(3)
    ]
    assert len(drawn(by_layer(tmp_path / "layers", rows, "a caption"))) == 12
    assert [axes.get_title() for axes in figures[0].axes] == ["sinks", "dimensions"]
    for axes, slope in zip(figures[0].axes, (0.25, -8.0), strict=True):
        line = [[layer, layer * slope] for layer in range(3)]
        assert points(axes) == {"keys": line, "values": line}
        assert axes.get_ylim()[0] == min(0.0, 2 * slope)


def test_pair_maps_have_boxes_around_heads_of_one_key(tmp_path: Path, figures: list[Figure]) -> None:
    correlation = np.random.default_rng(0).random((2, 4, 4))
    assert len(drawn(pair_maps(tmp_path / "pairs", correlation, 2, "n = 7"))) == 32
    *maps, _ = figures[0].axes
    for layer, axes in enumerate(maps):
        np.testing.assert_array_equal(axes.images[0].get_array(), correlation[layer])
        assert [(box.get_x(), box.get_width()) for box in axes.patches] == [(-0.5, 2), (1.5, 2)]
