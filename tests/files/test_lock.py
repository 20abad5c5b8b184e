"""A lock excludes other processes, dies with its own, and is then cleaned up after."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from chai_jax.errors import Stopped
from chai_jax.files import lock
from chai_jax.files.atomic import new_file, new_folder, owner
from chai_jax.files.lock import Busy, holder, locked
from chai_jax.stopping import listening

HOLD = """
import sys
from pathlib import Path
from chai_jax.files.atomic import new_file, new_folder
from chai_jax.files.lock import locked
path = Path(sys.argv[1])
with locked(path), new_file(path.parent / "deep" / "x.png") as file, new_folder(path.parent / "0-dense") as folder:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("half")
    file.write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".lock"


@contextmanager
def another(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock and is writing a file and a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    with another(path) as process:
        name = f"process {process.pid} on {socket.gethostname()}"
        assert holder(path) == name
        with pytest.raises(Busy, match=f"^{name}$"), locked(path):
            pass


def test_a_killed_holder_locks_nobody_out_and_leaves_nothing(path: Path) -> None:
    with another(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    root = path.parent
    assert len(list(root.rglob("*.x.png.*"))) == len(list(root.glob(".0-dense.*/model/weights"))) == 1
    assert holder(path) is None
    (root / ".mine.0123456789ab.x").write_text("of another process")
    with ExitStack() as living:
        mine = living.enter_context(new_file(root / "plan.json"))
        other = living.enter_context(new_folder(root / "1-cluster"))
        with locked(path):
            assert json.loads(path.read_text()) == {"host": socket.gethostname(), "pid": os.getpid(), "owner": owner()}
            names = {entry.relative_to(root).as_posix() for entry in root.rglob("*")}
            assert names == {".lock", "deep", ".mine.0123456789ab.x", mine.name, other.name}
    assert not path.exists()


def test_one_that_ended_well_leaves_no_lock(path: Path) -> None:
    with another(path) as process:
        process.communicate()
    assert {entry.name for entry in path.parent.iterdir()} == {"deep", "0-dense"}
    assert holder(path) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": "h", "pid": 1, "owner": "*"}', "\xff", "[" * 5000])
def test_whatever_the_file_holds_it_is_no_pattern_of_files_to_remove(content: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(content, encoding="latin-1")
    (path.parent / ".a.b.c").write_text("mine")
    with locked(path):
        assert (path.parent / ".a.b.c").exists()


def test_a_lock_whose_holder_is_just_removing_it_is_made_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a third process would make the file again, and both would hold a lock."""
    flock, removed = fcntl.flock, False

    def take(handle: int, operation: int) -> None:
        nonlocal removed
        flock(handle, operation)
        if not removed:
            path.unlink()
            removed = True

    monkeypatch.setattr(fcntl, "flock", take)
    with locked(path):
        assert removed
        assert holder(path) == f"process {os.getpid()} on {socket.gethostname()}"


def test_at_any_time_one_of_many(path: Path) -> None:
    """Each takes a lock that its predecessor is just removing."""
    count = path.parent / "count"
    path.parent.mkdir()
    count.write_text("0")

    def work() -> None:
        for _ in range(10):
            with locked(path, wait="which counts"):
                count.write_text(str(int(count.read_text()) + 1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.read_text() == "40"


def test_whoever_waits_says_for_whom_and_can_be_stopped(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    alarm = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    with another(path) as process:
        alarm.start()
        with pytest.raises(Stopped), listening(), locked(path, wait="which is training"):
            pass
        assert f"waiting for process {process.pid} on" in " ".join(capsys.readouterr().err.split())
        assert process.poll() is None


def test_where_there_are_no_locks_that_is_said(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(path):
        assert holder(path) is None
    assert "cannot be locked (No locks available)" in " ".join(capsys.readouterr().err.split())


def test_a_full_disk_is_an_error_that_names_the_lock_and_leaves_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/\.lock'"), locked(path):
        pass
    assert not path.exists()
