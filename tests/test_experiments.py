"""The scripts and the notebook of experiments/ ask for things that exist, at the paper's settings."""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.aot.programs import spec_of
from chai_jax.bench import sweep
from chai_jax.bench.floor import Rates
from chai_jax.cli import parse
from chai_jax.config import DistilConfig, RunConfig, TargetConfig
from chai_jax.files.published import architecture_of
from chai_jax.model.cache import cache_bytes
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.model.sharding import one_device
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.spec import Spec

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"


def parsed(command: str) -> Any:
    """What the program makes of a command line; an unknown option exits."""
    program, *argv = shlex.split(command)
    assert program == "chai-jax"
    return parse(argv)


def dry_run(*argv: str, **variables: str) -> list[RunConfig]:
    """The runs that paper.sh would start."""
    done = subprocess.run(
        ["bash", EXPERIMENTS / "paper.sh", *argv],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return [parsed(line) for line in done.stdout.splitlines()]


def test_the_script_asks_for_the_papers_settings() -> None:
    configs = dry_run("facebook/opt-350m")
    assert [config.task for config in configs] == ["sst2", "rte", "piqa"]
    for config in configs:
        assert config.model == "facebook/opt-350m"
        assert config.devices.require_backend == "tpu"
        assert config.operation.max_minutes == 500
        stages = [config.train.apply(stage().train) for stage in (DistilConfig, TargetConfig)]
        assert [(stage.batch, stage.epochs) for stage in stages] == [(128, 1), (64, 3)]
        assert {(stage.accumulation, stage.lr) for stage in stages} == {(8, 2e-5)}
    assert len({config.out for config in configs}) == 3


def test_the_script_takes_variables_and_options() -> None:
    variables = {"TASKS": "rte", "MINUTES": "9", "BACKEND": "gpu", "OUT": "/out", "DATA": "/my data"}
    (config,) = dry_run("facebook/opt-125m", "--seed", "3", **variables)
    assert (config.task, config.seed, config.operation.max_minutes) == ("rte", 3, 9)
    assert (config.out, config.data_dir) == (Path("/out/opt-125m-rte"), Path("/my data"))
    assert config.devices.require_backend == "gpu"
    (config,) = dry_run("--small", "--seed", "3")
    assert (config.model, config.task, config.devices.require_backend, config.seed) == ("toy", "toy", "cpu", 3)
    assert (config.train.lr, config.train.accumulation, config.train.max_steps) == (2e-5, 8, 2)
    (config,) = dry_run("facebook/opt-1.3b", "--mesh", "2x4", "--fsdp", TASKS="rte")
    assert (config.devices.mesh, config.devices.fsdp) == ("2x4", True)


def test_a_stopped_run_stops_the_script(tmp_path: Path) -> None:
    """With the program's own status, before the next task."""
    stub = tmp_path / "chai-jax"
    stub.write_text("#!/bin/sh\nexit 75\n")
    stub.chmod(0o755)
    for minutes, ran in (("5", 1), ("0", 0)):
        done = subprocess.run(
            ["bash", EXPERIMENTS / "paper.sh", "facebook/opt-125m"],
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


def test_the_folders_page_names_every_script() -> None:
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 40
    scripts = {path.name for pattern in ("*.py", "*.sh", "*.ipynb") for path in EXPERIMENTS.glob(pattern)}
    assert set(re.findall(r"`(\w+\.(?:py|sh|ipynb))`", page)) == scripts
    results = re.findall(r"\]\(\.\./docs/([\w/]+\.md)", page)
    assert len(results) == 5
    assert all((ROOT / "docs" / name).is_file() for name in results)


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
    ratios = [float(line[5]) for line in aot_table.headline(list(done.values()))[1:]]
    assert len(ratios) == 12
    assert min(ratios) > 3.5


@pytest.fixture
def bench_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module, with a machine of known speed under it."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # as the script would set it
    module = importlib.import_module("bench_gpu")
    for user in (module, sweep):
        monkeypatch.setattr(user, "probe_rates", lambda dtype, **_: Rates(1e9, 1e10, "float32"))
    programs = jax.config.jax_compilation_cache_dir
    yield module
    jax.config.update("jax_compilation_cache_dir", programs)
    for name in [name for name in sys.modules if name == "bench_gpu" or name.split(".")[0] == "lab"]:
        del sys.modules[name]


def test_a_gpu_is_asked_for(
    bench_gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for argv, status in (["--help"], 0), (["--out", str(tmp_path)], 2):
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *argv])
        with pytest.raises(SystemExit) as stopped:
            bench_gpu.start(bench_gpu.bench_gpu, bench_gpu.GpuOptions, bench_gpu.__doc__)
        assert stopped.value.code == status
        out, err = capsys.readouterr()
        if status == 0:
            assert "--no-peer" in out
        else:
            assert out == ""
            assert re.fullmatch(r"error: JAX found 8 x cpu \(cpu\); expected a gpu: .*, or give --anywhere\n", err)


@pytest.mark.slow
def test_what_a_gpu_would_be_measured_for(bench_gpu: Any, small_model: Path, tmp_path: Path) -> None:
    """Bytes by the formula, ratios and rates by the times, goals by the rows; every file there."""
    source = str(small_model)
    sizes = {"batch": 2, "start": 20, "steps": 4, "score_batches": "4", "question": 10, "rounds": 2, "memory": 1e-3}
    options = bench_gpu.GpuOptions(source, source, **sizes, anywhere=True, out=tmp_path)
    bench_gpu.bench_gpu(options)
    record = json.loads((tmp_path / "bench_gpu.json").read_text(encoding="utf-8"))
    config = architecture_of(source)
    specs = {"dense": spec_of(config), "compressed": spec_of(config, share="qkv", clusters=0.5, storage="int8")}
    rows = {(row["part"], row["cache"]): row for row in record["rows"]}
    assert len(rows) == 10
    for cache, spec in specs.items():
        row, limit = rows["decode", cache], rows["largest", cache]
        assert row["bytes"]["kv"] == row["bytes"]["kv_formula"] == cache_bytes(spec, 2, 24)
        assert row["rate"]["median"] == pytest.approx(2e3 / row["ms"]["median"])
        assert row["floor_fraction"] == pytest.approx(row["floor"]["ms"] / row["ms"]["median"])
        assert rows["prompt", cache]["bytes"]["kv"] == cache_bytes(spec, 8, 21)
        assert limit["batch"] == limit["largest"] > 0
        assert limit["needed"] <= limit["limit"] == int(1e-3 * 2**30)
    small, dense = rows["decode", "compressed"], rows["decode", "dense"]
    assert "torch" in rows["decode", "transformers"]["absent"]
    met = {goal["goal"]: goal["met"] for goal in record["goals"]}
    assert list(met.values()) == [
        small["times"]["dense"]["median"] >= 2.5,
        dense["floor_fraction"] >= 0.7,
        small["floor_fraction"] >= 0.7,
        None,
        max(rows["score", cache]["rate"]["median"] for cache in specs) >= 20000,
    ]
    text = (tmp_path / "bench_gpu.md").read_text(encoding="utf-8")
    assert sum(f"{goal['goal']}, at least" in text for goal in record["goals"]) == 5
    assert (tmp_path / "bench_gpu.csv").read_text(encoding="utf-8").count("\n") == 11


def test_ratios_say_how_many_times_as_fast(bench_gpu: Any, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laps of known length: 40 ms dense, 10 ms compressed."""
    models = {
        name: bench_gpu.model_of(str(small_model), name, bench_gpu.GpuOptions()) for name in ("dense", "compressed")
    }
    monkeypatch.setattr(
        bench_gpu, "Ours", lambda model, shape, *rest: Laps(40.0 if model.spec.is_dense else 10.0, shape)
    )
    shape = bench_gpu.Shape(2, 20, 4)
    options = bench_gpu.GpuOptions(rounds=3)
    dense, small = bench_gpu.raced(models, None, shape, options, Rates(1e9, 1e10, "float32"))
    assert small["times"]["dense"]["median"] == 4
    assert dense["times"]["compressed"]["median"] == 0.25
    assert (dense["rate"]["median"], small["rate"]["median"]) == (50, 200)


class Laps:
    """A contender whose steps take what they are said to."""

    framework, compile_seconds, bytes = "none", 0.0, {}

    def __init__(self, milliseconds: float, shape: Any) -> None:
        self.milliseconds, self.shape = milliseconds, shape

    def lap(self) -> list[float]:
        return [self.milliseconds]


OPT = Architecture(64, 32, 2, 4, 64, 48, embed_dim=32)
LLAMA = Architecture(
    64, 32, 2, 4, 64, 48, embed_dim=32, bias=False, activation="silu", num_kv_heads=2, norm="rms", gated=True,
    rotary=Rotary(), position_offset=0, family="llama",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("config", "backend"), [(OPT, "eager"), (LLAMA, None)], ids=("opt compiled", "llama"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries' own making
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_transformers_decodes_what_we_decode(
    bench_gpu: Any, torch: ModuleType, config: Architecture, backend: str | None
) -> None:
    """From the same cache, lap after lap; compiled as far as tracing goes, which is where models break."""
    from lab.decoding import Ours, Transformers

    spec = Spec.of(config)
    model = Model(config, spec, init(config, spec, jax.random.key(1), 0.3))
    shape = bench_gpu.Shape(3, 20, 6)
    ours, theirs = Ours(model, shape, 0), Transformers(model, shape, "cpu", "float32", backend)
    for (mine,), layer in zip(ours.held.layers, theirs.cache.layers, strict=True):
        layer.keys.copy_(torch.from_numpy(np.array(mine.keys)))
        layer.values.copy_(torch.from_numpy(np.array(mine.values)))
    for _ in range(2):
        assert min(*ours.lap(), *theirs.lap()) > 0
        assert np.asarray(ours.tokens).tolist() == theirs.tokens.tolist()
    assert len(np.unique(np.asarray(ours.tokens))) > 2
    assert ours.bytes["kv"] == theirs.bytes["kv"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries' own making
def test_transformers_reads_what_we_read(bench_gpu: Any, torch: ModuleType) -> None:
    """The same prompts, lap after lap, to the same first new tokens."""
    from lab.reading import Read, TransformersReads

    config = Architecture(64, 32, 2, 4, 64, 48, embed_dim=32)
    spec = Spec.dense(2, 4, 8)
    how = Execution.choose(layout=one_device())
    model = Model(config, spec, init(config, spec, jax.random.key(1), 0.3), execution=how)
    shape = bench_gpu.Shape(24, 20)
    ours, theirs = Read(model, model.params, shape, 0), TransformersReads(model, shape, 0, "cpu", "float32")
    for _ in range(2):
        assert min(*ours.lap(), *theirs.lap()) > 0
        assert np.asarray(ours.first).tolist() == theirs.first.tolist()
    assert len(np.unique(np.asarray(ours.first))) > 2
    assert ours.bytes["kv"] == cache_bytes(spec, 24, 21)


def test_memory_that_runs_out_means_a_smaller_batch(
    bench_gpu: Any, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, model: Any, shape: Any, seed: int, held: Any) -> None:
            assert held.layers[0][0].keys.shape[0] == shape.batch
            if shape.batch > 91:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        def lap(self) -> None:
            pass

    monkeypatch.setattr(sys.modules["lab.largest"], "Ours", Full)
    model = bench_gpu.model_of(str(small_model), "dense", bench_gpu.GpuOptions())
    assert bench_gpu.ran(model, 100, 24, 0) == 90
    assert bench_gpu.ran(model, 0, 24, 0) == 0
