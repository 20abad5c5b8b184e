"""The notebook and the shell scripts run as they are: in their small settings, and the notebook in Kaggle's too."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chai_jax.adapt.toy import toy_folder
from chai_jax.cli import parse
from chai_jax.config import RunConfig

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NOTEBOOK = EXPERIMENTS / "kaggle_tpu.ipynb"
OF_TABLES = "configurations methods quant target layer_sweep sensitivity throughput orders bigger_teacher"

# One stub for all programs: it writes down how it was called. $FAILS fails.
STUB = """#!/bin/bash
printf '%q ' "${0##*/}" "$@" | tee -a calls
echo >>calls
[ "${0##*/} $1" != "$FAILS" ]
"""


@pytest.fixture(autouse=True)
def _elsewhere(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of this Python, folders to write to, and a small model for the toy, which takes long to train."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for name in ("XDG_CACHE_HOME", "TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    shutil.copytree(small_model, toy_folder(0))


def cells(kind: str) -> list[Any]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def executed(folder: Path) -> list[Any]:
    """The code cells with their outputs, after a kernel has run all of them in `folder`."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.execute(notebook, str(folder), timeout=500)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_the_notebook_has_small_cells_without_outputs() -> None:
    code = cells("code")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert max(len(cell["source"]) for cell in code) <= 6
    assert any("Restart the session" in line for cell in cells("markdown") for line in cell["source"])


def test_the_notebook_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but what changes the machine and what would run the toy twice."""
    monkeypatch.setenv("CHAI_JAX_SMALL", "1")
    *_, table, text = executed(tmp_path)
    stages = [line.split(" | ")[0] for line in table.outputs[0].data["text/markdown"].splitlines()]
    assert stages[2:] == ["| dense", "| cluster", "| distil", "| quantize", "| target"]
    assert json.loads(printed(text).splitlines()[-1])["completion"].strip()


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the notebook in, at its own settings, among stubs; there is a table already."""
    folder, programs = tmp_path / "working", tmp_path / "programs"
    (folder / "runs/opt-125m-sst2/report").mkdir(parents=True)
    (folder / "runs/opt-125m-sst2/report/results.md").write_text("| a table |")
    programs.mkdir()
    for name in ("chai-jax", "grep", "pip"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    monkeypatch.delenv("CHAI_JAX_SMALL", raising=False)
    monkeypatch.setenv("FAILS", "nothing")
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    return folder


def called(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "calls").read_text(encoding="utf-8").splitlines()]


def test_the_notebook_asks_for_the_papers_settings(kaggle: Path) -> None:
    ran = executed(kaggle)
    assert ran[-2].outputs[0].data["text/markdown"] == "| a table |"
    assert printed(ran[-1]).startswith("chai-jax generate")
    commands = called(kaggle)
    assert [call[:2] for call in commands if call[0] == "pip"] == [["pip", "uninstall"], ["pip", "install"]]
    configs = [parse(argv) for program, *argv in commands if program == "chai-jax"]
    assert len(configs) == 4
    assert {config.devices.require_backend for config in configs} == {"tpu"}
    smoke, job = [config for config in configs if isinstance(config, RunConfig)]
    assert (smoke.model, smoke.limit, smoke.train.max_steps) == ("toy", 32, None)
    assert (job.model, job.task, job.limit, job.out) == ("facebook/opt-125m", "sst2", None, Path("runs/opt-125m-sst2"))
    assert (job.train.lr, job.train.accumulation, job.train.batch, job.operation.max_minutes) == (2e-5, 8, None, 480)


@pytest.mark.parametrize("command", ["pip install", "chai-jax run"])
def test_a_command_that_fails_stops_the_notebook(command: str, kaggle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", command)
    exceptions = pytest.importorskip("nbclient.exceptions")
    with pytest.raises(exceptions.CellExecutionError, match=f"status 1 of: {command}"):
        executed(kaggle)
    assert " ".join(called(kaggle)[-1]).startswith(command)


def rehearse(script: str, folder: Path, *argv: str) -> None:
    done = subprocess.run(
        ["bash", EXPERIMENTS / script, "--small", *argv], cwd=folder, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]


def rows(path: Path) -> list[Any]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


@pytest.mark.slow
def test_the_papers_script_in_small(tmp_path: Path) -> None:
    rehearse("paper.sh", tmp_path)
    stages = json.loads((tmp_path / "runs/small/toy-toy/results.json").read_text(encoding="utf-8"))
    assert [stage["stage"] for stage in stages] == ["dense", "cluster", "distil", "quantize", "target"]


@pytest.mark.slow
def test_every_table_in_small(tmp_path: Path) -> None:
    rehearse("all.sh", tmp_path)
    assert all(rows(tmp_path / f"runs/small/{name}.json") for name in OF_TABLES.split())


@pytest.mark.slow
def test_servers_in_small(tmp_path: Path) -> None:
    rehearse("serve_gpu.sh", tmp_path, str(tmp_path / "out"))
    found = rows(tmp_path / "out/serve_peers.json")
    assert [(row["server"], row["sent"], row["answered"]) for row in found] == [("k4v4", 20, 20), ("dense", 20, 20)]
