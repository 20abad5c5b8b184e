"""A signal is never lost, and what it stops is stopped where nothing is lost."""

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from chai_jax.cli import main
from chai_jax.commands.models import EvaluateCommand, GenerateCommand
from chai_jax.console import track
from chai_jax.errors import EXIT_STOPPED, Stopped
from chai_jax.run import pipeline
from chai_jax.stopping import listening, safe_point, terminated


class Node:
    pass


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """Whatever a test does, afterwards signals do what they did before."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not terminated()


def swallowed(number: int) -> None:
    """Send a signal while a weak reference's callback runs, where Python swallows every exception."""
    node = Node()
    reference = weakref.ref(node, lambda _: os.kill(os.getpid(), number))
    del node
    gc.collect()
    assert reference() is None


def test_sigterm_in_a_weak_references_callback_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []

    def work() -> None:
        with listening():
            swallowed(signal.SIGTERM)
            assert terminated()
            done.extend(track([1, 2], "Work"))

    with pytest.raises(Stopped) as stopped:
        work()
    assert done == []
    assert stopped.value.code == EXIT_STOPPED
    assert capsys.readouterr().err.count("stopped (SIGTERM)") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_in_a_weak_references_callback_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", kept.append)

    def work() -> None:
        with listening():
            swallowed(signal.SIGINT)
            assert len(kept) == 1
            safe_point()

    with pytest.raises(KeyboardInterrupt):
        work()


def test_ctrl_c_is_obeyed_at_once() -> None:
    reached: list[str] = []

    def work() -> None:
        with listening():
            signal.raise_signal(signal.SIGINT)
            reached.append("the next line")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == []


def test_leaving_is_a_safe_point_of_the_outermost_alone() -> None:
    reached: list[str] = []

    def work() -> None:
        with listening():
            with listening():
                signal.raise_signal(signal.SIGTERM)
            reached.append("the outer one")

    with pytest.raises(Stopped):
        work()
    assert reached == ["the outer one"]


def test_what_fails_is_not_hidden_by_a_signal() -> None:
    def work() -> None:
        with listening():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()


def test_what_the_caller_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            safe_point()
            heard = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        assert heard == [signal.SIG_IGN] * 2
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def test_outside_the_main_thread_nothing_is_heard_and_nothing_fails() -> None:
    done: list[bool] = []

    def work() -> None:
        with listening():
            done.append(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.parametrize(
    ("command", "number", "status"),
    [
        pytest.param("run", signal.SIGTERM, 75, marks=pytest.mark.slow),
        ("generate", signal.SIGINT, 130),
        pytest.param("run", signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_signals_while_the_program_imports(command: str, number: int, status: int) -> None:
    """Sent from within the first import of jax, which takes seconds."""
    script = (
        "import os, sys, importlib.abc\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == 'jax': sys.meta_path.remove(self); os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = ['chai-jax', '{command}', 'no-such-model', '--text', 'no-such-file']\n"
        "import chai_jax.__main__ as program\n"
        "sys.exit(program.main())\n"
    )
    if command == "generate":
        script = script.replace("'--text', 'no-such-file'", "'--prompt', 'x'")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "a-model"), "stopped"),
        (("evaluate", "a-model", "--text", "a-file"), "stopped"),
        (("run", "a-model", "--text", "a-file"), "stopped: the same command goes on from the last checkpoint"),
    ],
)
def test_ctrl_c_speaks_of_a_checkpoint_where_there_is_one(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pipeline, "run", interrupted)
    monkeypatch.setattr(GenerateCommand, "run", interrupted)
    monkeypatch.setattr(EvaluateCommand, "run", interrupted)
    assert main(arguments) == 130
    captured = capsys.readouterr()
    assert " ".join(captured.err.split()) == words
    assert captured.out == ""
