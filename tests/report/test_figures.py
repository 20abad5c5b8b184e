"""Pictures hold what they were given, in three formats."""

import csv
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from chai_jax.model.params import OPTConfig
from chai_jax.plans import ClusterPlan, LayerPlan, Plan
from chai_jax.report.figures import head_maps, pareto

CONFIG = OPTConfig(64, 32, 2, 4, 64, 24, 32)
PNG = b"\x89PNG\r\n\x1a\n"


def texts(svg: Path) -> int:
    """How many drawn things the SVG groups: it parses, and is not empty."""
    return sum(element.tag.endswith("}g") for element in ElementTree.parse(svg).iter())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_head_maps_are_ordered_by_cluster(tmp_path: Path) -> None:
    correlation = np.random.default_rng(0).random((2, 4, 4))
    clusters = (ClusterPlan((1, 3), 1), ClusterPlan((0,), 0), ClusterPlan((2,), 2))
    png, svg, table = head_maps(tmp_path / "heads", Plan((LayerPlan(clusters),) * 2), correlation, CONFIG, "n = 7")
    assert png.read_bytes().startswith(PNG)
    assert texts(svg) > 20
    rows = rows_of(table)
    assert [int(row["head"]) for row in rows[:16:4]] == [1, 3, 0, 2]
    for row in rows:
        at = tuple(int(row[name]) for name in ("layer", "head", "other"))
        assert float(row["correlation"]) == pytest.approx(correlation[at], abs=1e-6)


def test_pareto_shows_every_row(tmp_path: Path) -> None:
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
    png, svg, table = pareto(tmp_path / "pareto", rows, [("acc", "accuracy")], "cache %", "n = 3")
    assert png.read_bytes().startswith(PNG)
    assert texts(svg) > 20
    assert [row["label"] for row in rows_of(table)] == [row["label"] for row in rows]
