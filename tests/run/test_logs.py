"""TensorBoard and Weights & Biases get every number, and whatever they do, training goes on."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from chai_jax.run.logs import harmless, tensorboard, together, wandb

RECORDS = [{"stage": "distil", "step": step, "steps": 9, "loss": 1.0 / step, "mfu": 0.5} for step in (4, 5, 6)]


def module(name: str, monkeypatch: pytest.MonkeyPatch, **contents: Any) -> None:
    fake = ModuleType(name)
    for attribute, value in contents.items():
        setattr(fake, attribute, value)
    monkeypatch.setitem(sys.modules, name, fake)


def test_tensorboard_goes_on_at_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int):
            calls.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def flush(self) -> None: ...

    module("tensorboardX", monkeypatch, SummaryWriter=Writer)
    log = harmless("TensorBoard", tensorboard(tmp_path, "distil"))
    for record in RECORDS[:2]:
        log(record)
    assert calls == [
        (str(tmp_path / "distil"), 4),
        ("loss", 0.25, 4),
        ("mfu", 0.5, 4),
        ("loss", 0.2, 5),
        ("mfu", 0.5, 5),
    ]


@pytest.mark.parametrize(("known", "mode"), [(True, None), (False, "offline")])
def test_wandb_is_one_run_that_is_resumed(
    known: bool, mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    opened: list[dict[str, Any]] = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append)

    def init(**settings: Any) -> Any:
        opened.append(settings)
        return run

    module("wandb", monkeypatch, login=lambda prompt: known, run=None, init=init)
    log = harmless("Weights & Biases", wandb("opt", tmp_path, {"seed": 0}, "distil"))
    for record in RECORDS:
        log(record)
    (settings,) = opened
    assert (settings["project"], settings["resume"], settings["mode"]) == ("opt", "allow", mode)
    assert logged[0] == {"distil/loss": 0.25, "distil/mfu": 0.5, "distil/step": 4}
    assert len(logged) == 3


def broken(*_: Any, **__: Any) -> Any:
    raise ConnectionError("the network is gone\nreally")


def leaves(*_: Any, **__: Any) -> Any:
    raise SystemExit(1)


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)


def fails_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    module("tensorboardX", monkeypatch, SummaryWriter=broken)
    module("wandb", monkeypatch, login=lambda prompt: True, run=None, init=leaves)


def fails_later(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SimpleNamespace(add_scalar=broken, flush=broken)
    module("tensorboardX", monkeypatch, SummaryWriter=lambda *_, **__: writer)
    run = SimpleNamespace(define_metric=broken, log=broken)
    module("wandb", monkeypatch, login=lambda prompt: True, run=run, init=None)


@pytest.mark.parametrize("how", [missing, fails_to_begin, fails_later])
def test_a_sink_that_fails_is_reported_once(
    how: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    how(monkeypatch)
    kept: list[Any] = []
    sinks = [
        harmless("TensorBoard", tensorboard(tmp_path, "distil")),
        harmless("Weights & Biases", wandb("opt", tmp_path, {}, "distil")),
        kept.append,
    ]
    for record in RECORDS:
        together(sinks)(record)
    assert kept == RECORDS
    errors = capsys.readouterr().err
    assert errors.count("nothing more goes to TensorBoard") == errors.count("nothing more goes to Weights") == 1
    assert "Traceback" not in errors
