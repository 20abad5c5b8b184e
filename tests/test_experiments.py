"""The scripts and the notebook of experiments/ ask for things that exist, at the paper's settings."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro
from tyro.conf import OmitArgPrefixes

from chai_jax.cli import Command
from chai_jax.config import DistilConfig, RunConfig, TargetConfig

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
SCRIPTS = {"opt125m": "facebook/opt-125m", "opt350m": "facebook/opt-350m", "opt1_3b": "facebook/opt-1.3b"}


def parsed(command: str) -> Any:
    """What the program makes of a command line; an unknown option exits."""
    program, *argv = shlex.split(command)
    assert program == "chai-jax"
    return tyro.cli(OmitArgPrefixes[Command], args=argv)  # type: ignore[misc]


def dry_run(script: str, *argv: str, **variables: str) -> list[RunConfig]:
    done = subprocess.run(
        ["bash", EXPERIMENTS / f"{script}.sh", *argv],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return [parsed(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_ask_for_the_papers_settings(script: str) -> None:
    configs = dry_run(script)
    assert [config.task for config in configs] == ["sst2", "rte", "piqa"]
    for config in configs:
        assert config.model == SCRIPTS[script]
        assert config.devices.require_backend == "tpu"
        assert config.operation.max_minutes == 500
        stages = [config.train.apply(stage().train) for stage in (DistilConfig, TargetConfig)]
        assert [(stage.batch, stage.epochs) for stage in stages] == [(128, 1), (64, 3)]
        assert {(stage.accumulation, stage.lr) for stage in stages} == {(8, 2e-5)}
    assert len({config.out for config in configs}) == 3


def test_scripts_take_variables_and_options() -> None:
    (config,) = dry_run("opt125m", "--seed", "3", TASKS="rte", MINUTES="9", BACKEND="gpu", OUT="/out", DATA="/my data")
    assert (config.task, config.seed, config.operation.max_minutes) == ("rte", 3, 9)
    assert (config.out, config.data_dir) == (Path("/out/opt-125m-rte"), Path("/my data"))
    assert config.devices.require_backend == "gpu"
    (config,) = dry_run("opt1_3b", TASKS="rte", MESH="4x4")
    assert (config.devices.mesh, config.devices.fsdp) == ("4x4", True)


def test_a_stopped_run_stops_the_script(tmp_path: Path) -> None:
    """With the program's own status, before the next task."""
    stub = tmp_path / "chai-jax"
    stub.write_text("#!/bin/sh\nexit 75\n")
    stub.chmod(0o755)
    for minutes, ran in (("5", 1), ("0", 0)):
        done = subprocess.run(
            ["bash", EXPERIMENTS / "opt125m.sh"],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "MINUTES": minutes},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 75
        assert done.stdout.count("chai-jax run") == ran


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck() -> None:
    scripts = [*EXPERIMENTS.glob("*.sh"), ROOT / "tpu_setup.sh"]
    assert subprocess.run(["shellcheck", *scripts], capture_output=True, text=True).stdout == ""


def cells(kind: str) -> list[str]:
    notebook = json.loads((EXPERIMENTS / "kaggle_tpu.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_has_small_cells_without_outputs() -> None:
    notebook = json.loads((EXPERIMENTS / "kaggle_tpu.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert max(len(cell["source"]) for cell in code) <= 6
    assert any("Restart the session" in text for text in cells("markdown"))


def test_the_notebooks_code_compiles() -> None:
    for cell in cells("code"):
        if cell.startswith("%%bash"):
            checked = subprocess.run(["bash", "-n"], input=cell.split("\n", 1)[1], text=True, capture_output=True)
            assert checked.stderr == ""
        else:
            lines = ["pass" if line[:1] in ("!", "%") else line for line in cell.splitlines()]
            assert ast.parse("\n".join(lines)).body


def test_the_notebooks_commands_are_the_programs() -> None:
    commands = [line[1:] for cell in cells("code") for line in cell.splitlines() if line.startswith("!chai-jax")]
    values = {"{MODEL}": "facebook/opt-125m", "{TASK}": "sst2", "{MINUTES}": "480", "{OUT}": "/kaggle/working/runs/a"}
    configs = [parsed(re.sub(r"\{\w+\}", lambda found: values[found[0]], command)) for command in commands]
    assert len(configs) == 4
    assert {config.devices.require_backend for config in configs} == {"tpu"}
    (job,) = [config for config in configs if isinstance(config, RunConfig) and config.model != "toy"]
    assert (job.train.lr, job.train.accumulation, job.train.batch, job.operation.max_minutes) == (2e-5, 8, None, 480)


@pytest.fixture
def aot_table() -> Any:
    source = importlib.util.spec_from_file_location("aot_table", EXPERIMENTS / "aot_table.py")
    module = importlib.util.module_from_spec(source)
    sys.modules["aot_table"] = module
    source.loader.exec_module(module)
    yield module
    del sys.modules["aot_table"]


def test_the_published_tables_are_those_of_their_records(aot_table: Any) -> None:
    book = aot_table.Book(EXPERIMENTS / "results")
    records = list(book.done.values())
    assert (book.folder / "aot.md").read_text() == aot_table.markdown(records)
    assert (book.folder / "aot.csv").read_text() == aot_table.as_csv(records)
    for record in records:
        assert record["fits"] == (aot_table.size(record) <= record["hbm_limit"])


def test_what_does_not_fit_has_an_option_that_does(aot_table: Any) -> None:
    """Of every model and slice: distillation at the paper's batch, then its options up to the first that fits; the
    cache's largest batches, dense and compressed."""
    done = aot_table.Book(EXPERIMENTS / "results").done
    for row in aot_table.rows():
        assert row.key in done
        if not done[row.key]["fits"]:
            tried = (done[option.key]["fits"] for option in aot_table.rescues(row) if option.key in done)
            assert True in tried, row
    ratios = [float(line[4]) for line in aot_table.headline(list(done.values()))[1:]]
    assert len(ratios) == 8
    assert min(ratios) > 3.5
