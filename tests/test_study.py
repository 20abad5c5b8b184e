"""The study: its rows are what they are called, and a small one runs, goes on where it stopped, and adds up."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chai_jax.data.toy import toy_rows
from chai_jax.files.store import load
from chai_jax.plans.architecture import Architecture

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `python experiments/study.py` finds its modules."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in [name for name in sys.modules if name == "study" or name.split(".")[0] == "lab"]:
        del sys.modules[name]


def test_partitions_drawn_at_random_use_every_head_once() -> None:
    from lab.variants import at_random

    for count in range(1, 9):
        parts = at_random(8, count, np.random.default_rng(count))
        assert len(parts) == count
        assert sorted(head for part in parts for head in part.heads) == list(range(8))
        assert all(part.keep in part.heads for part in parts)


def test_ranks_are_the_smallest_that_hold_the_energy() -> None:
    from lab.study_tables import ranks_for

    rows = [
        {"what": what, "layer": layer, "rank": rank, "energy": energy}
        for what, layer, energies in (
            ("keys", 0, (0.5, 0.9, 1.0)),
            ("keys", 1, (0.99, 1.0, 1.0)),
            ("values", 0, (1.0,)),
        )
        for rank, energy in enumerate(energies, 1)
    ]
    assert ranks_for(rows, 0.9) == {"keys": [2, 1], "values": [1]}
    assert ranks_for(rows, 0.95) == {"keys": [3, 1], "values": [1]}


def test_a_full_sequence_counts_all_it_keeps() -> None:
    from lab.study_tables import full

    dense = {"kv_bytes_per_token": 100, "kv_bytes_per_sequence": 0}
    int4 = {"kv_bytes_per_token": 10, "kv_bytes_per_sequence": 640}
    assert full(int4, dense, 64)["kv_fraction_full"] == 0.2
    assert full(dense, dense, 64)["kv_fraction_full"] == 1.0


def test_predictions_are_ranked_over_distinct_plans() -> None:
    from lab.study_tables import predictions

    def plan(predicted: float, kl: float) -> dict[str, Any]:
        return {"choices": "clusters", "kv_fraction": 1 / predicted, "predicted": predicted, "kl": kl}

    plans = [plan(1.0, 2.0), plan(2.0, 4.0), plan(3.0, 6.0), plan(4.0, 5.0)]
    found = predictions([*plans, plan(4.0, 5.0)])
    assert found["plans"] == 4
    assert found["spearman"] == found["spearman_clusters"] == pytest.approx(0.8)  # two neighbours of four exchanged
    assert found["measured_over_predicted"]["median"] == pytest.approx(2.0)
    assert predictions(plans[:2]) == {"plans": 2}


@pytest.mark.slow
def test_a_small_study(small_model: Path, tmp_path: Path) -> None:
    from study import Study, run

    data, text = tmp_path / "sst2", tmp_path / "text.txt"
    data.mkdir()
    for split, count in (("train", 60), ("validation", 24)):
        lines = [json.dumps({"sentence": row["sentence"], "label": row["label"]}) for row in toy_rows(split, count)]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    text.write_text("\n".join(row["sentence"] for row in toy_rows("train", 1500)))
    wanted = ("int8", "int4", "chai-0.5", "chai-prompt-0.5", "qkv-fit-0.5", "latent-0.25", "everything-0.35")

    def study(rows: str, distil: int = 0) -> Any:
        return run(
            Study(
                str(small_model), tmp_path, (text,), text, out=tmp_path / "out", rows=rows, distil=distil, batch=4,
                window=16, windows=6, calibration=8,
            )
        )  # fmt: skip

    study(",".join(wanted))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "rows").glob("*/record.json")}
    assert study("latent-0.25", distil=2)["rows"] == len(wanted) + 2  # and the dense row, and the trained one
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    rows = {row["row"]: row for row in found["rows"]}
    config: Architecture = load(str(small_model)).config
    dense = 2 * config.num_layers * config.hidden_size * 2
    assert rows["dense"]["kv_bytes_per_token"] == dense
    assert rows["dense"]["output_error"] == pytest.approx(0, abs=1e-3)
    assert rows["chai-0.5"]["kv_fraction"] == rows["chai-prompt-0.5"]["kv_fraction"] == 0.75
    assert rows["qkv-fit-0.5"]["kv_fraction"] == 0.5
    assert rows["latent-0.25"]["kv_fraction"] == rows["latent-0.25+distil"]["kv_fraction"] == 0.25
    assert rows["everything-0.35"]["kv_fraction"] <= 0.35
    assert all(row["kv_bytes_per_token"] == row["kv_bytes_per_token_formula"] for row in rows.values())
    assert rows["latent-0.25+distil"]["text"]["loss"] != rows["latent-0.25"]["text"]["loss"]
    assert {path.name for path in (tmp_path / "out").glob("study*")} == {
        *(f"study.{suffix}" for suffix in ("json", "csv", "md")),
        *(
            f"study-{name}.{suffix}"
            for name in ("pareto", "pareto-distilled", "spectrum")
            for suffix in ("png", "svg", "csv")
        ),
    }
