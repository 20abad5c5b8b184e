"""A job gives the same on every mesh, in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # together they take minutes

SCRIPT = Path(__file__).parents[1] / "experiments" / "agree_across_meshes.py"


def spreads(*measures: str) -> dict[str, dict[str, Any]]:
    """Per layout the largest differences to one device."""
    done = subprocess.run([sys.executable, SCRIPT, *measures], env=os.environ, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    print(done.stdout)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["spreads"]
    assert len(found) == 5  # 8 data, 4 x 2, FSDP, and what each of two processes saw
    return found


def test_twenty_updates_and_their_evaluation_are_the_same() -> None:
    for layout, row in spreads("sgd").items():
        assert max(row[name] for name in ("loss", "grad_norm", "sgd_parameters", "loglikelihoods")) <= 1e-5, layout
        assert row["predictions"] == 0, layout


@pytest.mark.slow
def test_gradients_probes_and_generated_tokens_are_the_same() -> None:
    for layout, row in spreads("gradient", "adamw", "looking").items():
        assert max(row[name] for name in ("gradient", "probe")) <= 1e-5, layout
        assert row["tokens"] == 0, layout
        assert row["adamw_parameters"] <= UPDATES * RATE, layout


UPDATES, RATE = 20, 1e-3  # AdamW moves a parameter by about the rate in an update, wherever rounding errors send it
