"""The devices a command runs on: what is asked for is what is used, or the command stops."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chai_jax.cli import main
from chai_jax.config import DeviceConfig
from chai_jax.data.toy import toy_rows
from chai_jax.errors import InputError
from chai_jax.model.execution import Execution
from chai_jax.model.sharding import Layout, make_mesh
from chai_jax.run import devices


def test_the_mesh_is_the_one_asked_for() -> None:
    how = devices.start(DeviceConfig(mesh="2x4", fsdp=True, require_backend="cpu"))
    assert how.layout == Layout(make_mesh(2, 4), fsdp=True)
    assert devices.start(DeviceConfig()) == Execution.choose("float32", Layout(make_mesh(8, 1)), "xla")


def test_the_dtype_is_the_one_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["compute_dtype"] == "bfloat16"
    assert devices.start(DeviceConfig(dtype="bfloat16")).dtype == "bfloat16"
    assert devices.start(DeviceConfig()).dtype == "float32"  # of this CPU


def test_compiled_programs_are_kept_and_read_back(tmp_path: Path) -> None:
    """In a process each, since a process that has compiled a program does not read it."""
    tell = (
        "import jax; from pathlib import Path\n"
        "from chai_jax.config import DeviceConfig; from chai_jax.run import devices\n"
        "heard = []; jax.monitoring.register_event_listener(lambda event, **_: heard.append(event))\n"
        "devices.start(DeviceConfig(compile_cache=Path('programs')))\n"
        "jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))); print(heard.count('/jax/compilation_cache/cache_hits'))"
    )
    hits = [
        int(subprocess.run([sys.executable, "-c", tell], cwd=tmp_path, check=True, capture_output=True).stdout)
        for _ in range(2)
    ]
    assert hits[0] == 0
    assert hits[1] > 0
    assert any((tmp_path / "programs").iterdir())


def test_programs_that_cannot_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["env", "--compile-cache", str(tmp_path / "file")]) == 2
    assert "choose another --compile-cache" in capsys.readouterr().err


@pytest.mark.parametrize("mesh", ["8", "4y2", "x2", "-4x2", "2x2x2", "", "axb"])
def test_a_mesh_is_two_numbers(mesh: str) -> None:
    with pytest.raises(InputError, match="expected DATAxMODEL"):
        devices.parse_mesh(mesh)


def test_a_backend_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for wanted in ("tpu", "gpu"):
        assert main(["env", "--require-backend", wanted]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert f"--require-backend is {wanted}; JAX found 8 x cpu (cpu)" in captured.err
    assert main(["env", "--require-backend", "cpu", "--mesh", "9x1"]) == 2
    assert "does not fit 8 devices" in capsys.readouterr().err


def test_half_of_the_flags_that_name_other_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--coordinator", "localhost:1"]) == 2
    assert "--process-count and --process-id together" in capsys.readouterr().err


def test_processes_that_no_cluster_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--distributed"]) == 2
    assert "cannot join the other processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 1),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_PROCESS_ADDRESSES": "local"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1,t1k-2,t1k-3"}, 4),
    ],
)
def test_hosts_of_a_tpu_from_the_environment(
    variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert devices.tpu_hosts() == expected


@pytest.mark.parametrize(("answer", "expected"), [("a:0:10.0.0.1,b:1:10.0.0.2", 2), ("a:0:10.0.0.1", 1), (None, 1)])
def test_hosts_of_a_tpu_vm_from_its_metadata(
    answer: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            right = self.path.endswith("/attributes/worker-network-endpoints")
            self.send_response(200 if answer and right and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    monkeypatch.setattr(devices, "Path", lambda _: Path("/"))  # there is a device file
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    try:
        assert devices.tpu_hosts() == expected
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "place", ["localhost", "localhost:", ":1234", "a:b", "a:0", "a:65536", "a:1234:", "", "a\nb:1", "\ud800"]
)
def test_a_coordinator_without_a_port(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX would fail in a traceback, or wait for it in vain."""
    with pytest.raises(InputError, match="expected HOST:PORT, such as"):
        devices.join_processes(DeviceConfig(coordinator=place, process_count=2, process_id=0))
    monkeypatch.setattr(os, "environ", {**os.environ, "JAX_COORDINATOR_ADDRESS": place})
    with pytest.raises(InputError, match="expected HOST:PORT, such as"):
        devices.join_processes(DeviceConfig())


@pytest.mark.parametrize(("count", "index"), [(0, 0), (2, 2), (2, -1), (-1, 0), (2**70, 0)])
def test_processes_that_cannot_be(count: int, index: int) -> None:
    with pytest.raises(InputError, match="--process-id is"):
        devices.join_processes(DeviceConfig(coordinator="localhost:1", process_count=count, process_id=index))


def in_processes(count: int, *argv: str | Path) -> list[subprocess.CompletedProcess[str]]:
    """The same command in several processes of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "chai_jax.cli", *map(str, argv), "--coordinator", coordinator]
    running = [
        subprocess.Popen(
            [*command, "--process-count", str(count), "--process-id", str(process)],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    return [
        subprocess.CompletedProcess(command, process.returncode, *output)
        for process, output in zip(running, outputs, strict=True)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The toy's rows under the name of SST-2."""
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    for split, count in (("train", 96), ("validation", 21)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows(split, count)))
    return folder.parent


@pytest.mark.slow
def test_two_processes_evaluate_as_one(
    small_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first prints and writes; the second says nothing."""
    job = ("evaluate", small_model, "--task", "sst2", "--data-dir", data, "--out")
    first, second = in_processes(2, *job, tmp_path / "two")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    assert main([*map(str, job), str(tmp_path / "one")]) == 0
    printed = (json.loads(text.splitlines()[-1])["sst2"] for text in (first.stdout, capsys.readouterr().out))
    assert len({found["acc"] for found in printed}) == 1
    written = ((tmp_path / name / "samples_sst2.jsonl").read_text().splitlines() for name in ("two", "one"))
    found, alone = ([json.loads(line)["loglikelihoods"] for line in lines] for lines in written)
    assert len(found) == 21
    np.testing.assert_allclose(found, alone, atol=1e-5)


@pytest.mark.slow
def test_two_processes_run_a_job(small_model: Path, data: Path, tmp_path: Path) -> None:
    """Every file is written once, by the first; repeating the command computes nothing."""
    job = ["run", small_model, "--task", "sst2", "--data-dir", data, "--out", tmp_path / "out", "--finetune", "never"]
    job += ["--layers=1", "--clusters=2", "--calibration=8", "--batch=8", "--max-steps=2", "--mesh=2x2"]
    for _ in range(2):
        first, second = in_processes(2, *job)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        assert second.stdout == ""
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [record["stage"] for record in records] == ["dense", "cluster", "distil", "quantize", "target"]
    assert {record["processes"] for record in records} == {2}
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_the_others_stop_where_the_first_cannot_write(small_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "samples" / "samples_sst2.jsonl").mkdir(parents=True)
    job = ("evaluate", small_model, "--task", "sst2", "--data-dir", data, "--out", tmp_path / "samples")
    first, second = in_processes(2, *job)
    assert first.returncode != 0
    assert second.returncode == 2
    assert "the first process could not write" in second.stderr
