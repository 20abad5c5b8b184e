"""Where results go: terminals of any width, encodings, pipes that are closed early; names are printed as they are."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chai_jax.cli import main
from chai_jax.console import console, print_table
from chai_jax.report.tables import terminal
from chai_jax.run import pipeline


@pytest.fixture
def plan(small_model: Path, tmp_path: Path) -> Path:
    clusters = [{"heads": [head], "keep": head, "storage": "bfloat16"} for head in range(4)]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"layers": [{"clusters": clusters, "tier": "high"}] * 2, "share": "qkv"}))
    return path


def test_stdout_that_is_not_utf_8(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under PYTHONIOENCODING=ascii."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii", write_through=True))
    assert main(["generate", str(small_model), "--prompt", "caf\u00e9 \u00b1", "--max-new-tokens", "1"]) == 0
    lines = raw.getvalue().decode("ascii").splitlines()
    assert lines[0].startswith("caf\\xe9 \\xb1")
    assert json.loads(lines[-1])["prompt"] == "caf\u00e9 \u00b1"
    print_table(terminal([], "score \u00b1 s.e."))
    assert b"score \\xb1 s.e." in raw.getvalue()


@contextmanager
def nobody_reads() -> Iterator[None]:
    """A stdout whose reader is gone. pytest sets its own before a test begins, so this is no fixture."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        yield


@pytest.mark.parametrize("command", ["explain PLAN", "generate MODEL --max-new-tokens 3", "verify MODEL MODEL"])
def test_a_reader_that_has_seen_enough(
    command: str, small_model: Path, plan: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [{"PLAN": str(plan), "MODEL": str(small_model)}.get(word, word) for word in command.split()]
    with nobody_reads():
        assert main(words) == 0
    assert capfd.readouterr().err == ""


STAGE = {
    "stage": "quantize",
    "kv_bytes_per_token": 1_234_567,
    "kv_reduction": 0.123,
    "model_bytes": 12_345_678_901,
    "latency": {name: {"median": 1234.56} for name in ("score_ms_per_example", "decode_ms_per_token")},
}
ACCURACY = {"acc": 0.803, "acc_stderr": 0.013, "difference": -0.383, "difference_interval": [-0.4197, -0.3463]}
FLIPS = {"flips": {"right_to_wrong": 1440, "wrong_to_right": 1157}}
TEXT = {"perplexity": 1234.56, "perplexity_stderr": 12.34, "difference": 0.123, "difference_interval": [0.1, 0.2]}


@pytest.mark.parametrize("metrics", [ACCURACY | FLIPS, TEXT], ids=["task", "text"])
def test_the_table_of_a_run_fits(metrics: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is too wide, cells are broken at blanks: every number stays whole."""
    print_table(terminal([{**STAGE, "metrics": metrics}], "facebook/opt-13b on sst2"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    words = {word for line in lines for word in line.split()}
    assert words >= {"quantize", "1,234,567", "12,345,678,901", "1234.56", "12.3"}
    assert any("quantize" in line and "12,345,678,901" in line for line in lines)


def test_a_plan_is_told_with_its_damage(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "predicted": 0.01234, "measured": 0.02}))
    assert main(["explain", str(plan)]) == 0
    *table, result = capsys.readouterr().out.splitlines()
    assert any("KL, nats/token: predicted 0.012, measured 0.02" in line for line in table)
    assert max(map(len, table)) <= 120
    found = json.loads(result)
    assert (found["predicted"], found["measured"], len(found["layers"])) == (0.01234, 0.02, 2)


def test_work_goes_on_after_a_table_that_nobody_reads() -> None:
    with nobody_reads():
        print_table(terminal([], "title"))
        print_table(terminal([], "title"))
        assert sys.stdout.write("goes nowhere") == len("goes nowhere")
        assert sys.stdout.flush() is None


def test_help_that_nobody_reads() -> None:
    script = f"{sys.executable} -m chai_jax.cli run --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_stdout_that_is_full(plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    monkeypatch.setattr(sys, "stdout", full)
    assert main(["explain", str(plan)]) == 2
    full.close()
    assert "No space left on device" in capsys.readouterr().err


def test_stdout_that_is_closed(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["explain", str(plan)]) == 0
    sys.stdout.close()


@pytest.mark.parametrize("columns", [pytest.param("1", marks=pytest.mark.slow), "4"])
def test_help_in_a_narrow_terminal(columns: str) -> None:
    """A process of its own, since it would never return."""
    command = [sys.executable, "-m", "chai_jax.cli", "run", "--help"]
    done = subprocess.run(
        command, env={**os.environ, "COLUMNS": columns}, capture_output=True, text=True, timeout=120, check=True
    )
    assert "--checkpoint-minutes MINUTES" in done.stdout


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = "[/b] [red]x :smile: {0}"
    print_table(terminal([], name))
    console.print(f"warning: {name}")
    assert main(["verify", name, name]) == 2
    captured = capsys.readouterr()
    assert name in captured.out
    assert captured.err.splitlines()[0] == f"warning: {name}"
    assert f"error: there is no folder {name};" in captured.err


def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "toy", "--task", "a\nb\x1b[31m\u2028\ud800"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"a\nb\x1b[31m\u2028\ud800" in line
    assert main(["evaluate", "toy", "--task", "n" * 5000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 1000
    assert line.endswith("expected one of sst2, rte, piqa, hellaswag, toy, or a file: NAME.yaml")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (PermissionError(13, "Permission denied", "x"), "error: [Errno 13] Permission denied: 'x'"),
        (BrokenPipeError(32, "Broken pipe"), "error: [Errno 32] Broken pipe"),  # of a socket, while stdout is read
        (MemoryError("Unable to allocate 1 PiB"), "error: there is not enough memory (Unable to allocate 1 PiB)"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "error: there is not enough memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    failure: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object, execution: object) -> None:
        raise failure

    monkeypatch.setattr(pipeline, "run", fail)
    assert main(["run"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(message)


def test_results_are_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that JSON has not are null."""
    monkeypatch.setattr(
        pipeline, "run", lambda config, execution: {"x": [math.inf, -math.inf, math.nan, 1.5], "y": (1, "\udcff")}
    )
    assert main(["run"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {"x": [None, None, None, 1.5], "y": [1, "\udcff"]}
