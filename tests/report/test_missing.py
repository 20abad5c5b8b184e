"""Figures that are not finite, which results.json has as null: shown as "-", and no picture fails on them."""

import json
import shutil
from pathlib import Path

import pytest

from chai_jax.report.page import write_page
from chai_jax.report.tables import markdown, number


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "dashes"), [(slice(0, 1), 1), (slice(None), 2)])
def test_a_perplexity_beyond_floats(stages: slice, dashes: int, text_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(text_run, tmp_path / "run"))
    records = json.loads((run / "results.json").read_text())
    for record in records[stages]:
        record["metrics"] |= {"perplexity": None, "perplexity_stderr": None, "loss": 800.0, "loss_stderr": None}
    (run / "results.json").write_text(json.dumps(records))
    assert markdown(records).count("ppl - \u00b1 -") >= dashes
    write_page([run], tmp_path / "report.html", tmp_path / "pictures")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("ppl - \u00b1 -") >= dashes
    assert "800.0000 \u00b1 -" in page
    assert "nan" not in page.lower().split("<style")[0]


def test_a_figure_as_text() -> None:
    assert [number(value) for value in (None, float("nan"), float("inf"), 1.234)] == ["-", "-", "-", "1.23"]
    assert number(0.5, "+.1f", 100) == "+50.0"
