"""Signals at random moments leave no trace in what a run leaves."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "kill.py"


@pytest.mark.slow
def test_runs_stopped_thirty_times_leave_the_same_folders() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["kills"].values()) == 30
    assert set(found["kills"]) == {"SIGKILL", "SIGTERM", "SIGINT"}
    assert found["differences"] == []


def test_folders_are_compared_file_by_file(kill: ModuleType, tmp_path: Path) -> None:
    files = {
        "stages/0-dense/model/model.safetensors": "0101",
        "stages/0-dense/record.json": '{"metrics": {"acc": 0.5}, "seconds": 1.0}',
        "metrics.jsonl": '{"step": 1, "loss": 2.0, "step_s": 0.1}\n{"step": 2, "loss": 1.0, "step_s": 0.1}\n',
        "report/losses.png": "a picture",
        "report/pareto.png": "a picture of times",
    }

    def folder(name: str, **changes: str) -> Path:
        for path, content in (files | {key.replace("__", "/"): value for key, value in changes.items()}).items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(content)
        return tmp_path / name

    one = folder("one")
    clocks = {
        "stages/0-dense/record.json": '{"metrics": {"acc": 0.5}, "seconds": 2.0}',
        "metrics.jsonl": files["metrics.jsonl"].replace("0.1", "0.2"),
        "report/pareto.png": "a picture of other times",
    }
    assert kill.differences(one, folder("clocks", **clocks)) == []
    for number, (path, content) in enumerate(files.items()):
        if path != "report/pareto.png":
            changed = content.replace("0.5", "0.6").replace("2.0", "2.1").replace("01", "11").replace("a p", "A p")
            assert kill.differences(one, folder(f"changed{number}", **{path: changed})) == [path]
    assert kill.differences(one, folder("more", **{"report/.losses.png.x": ""})) == ["report/.losses.png.x"]
    (folder("less") / "report" / "pareto.png").unlink()
    assert kill.differences(one, tmp_path / "less") == ["report/pareto.png"]
