"""The jax that is installed computes rightly on CPUs; what `chai-jax env` says where one does not."""

import json
import subprocess
from pathlib import Path

import pytest

from chai_jax.cli import main
from chai_jax.machine import canaries


def test_this_jax_computes_rightly() -> None:
    assert canaries.outcomes() == {"dot_then_sum": "right", "sum_over_eight_axes": "right"}


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('wrong by 1')", "wrong by 1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashes: SIGSEGV"),
        ("raise ImportError('no jax')", "ImportError: no jax"),
        ("raise SystemExit(3)", "ends with status 3"),
    ],
)
def test_env_says_what_is_wrong_and_lives(
    program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary.py"
    canary.write_text(program, encoding="utf-8")
    monkeypatch.setattr(canaries, "__file__", str(canary))
    assert main(["env"]) == 0
    assert json.loads(capsys.readouterr().out)["canaries"] == dict.fromkeys(canaries.CANARIES, said)


def test_a_canary_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary.py"
    canary.write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setattr(canaries, "__file__", str(canary))
    monkeypatch.setattr(canaries, "CANARY_SECONDS", 1)
    assert set(canaries.outcomes().values()) == {"hangs: no result within 1 s"}


def test_a_canary_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert set(canaries.outcomes().values()) == {"not tried: Resource temporarily unavailable"}
