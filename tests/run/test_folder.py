"""A run folder: what it holds, who may write there, and what to do about what is damaged."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from chai_jax.errors import InputError
from chai_jax.files import lock
from chai_jax.files.atomic import write_jsonl
from chai_jax.files.lock import LOCK
from chai_jax.run.folder import RunFolder

DEAD = "0123456789ab"  # the mark of a killed process in the names of its temporary files


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)


def test_a_second_run_is_refused_in_a_line_that_names_the_first(tmp_path: Path) -> None:
    out, config = tmp_path / "out", {"model": "toy"}
    early = RunFolder(out, config)  # looked before the first began
    name = rf"process {os.getpid()} on {socket.gethostname()}"
    message = rf"out has a run under way \({name}\); expected one at a time: wait for it, stop it, or choose another"
    with RunFolder(out, config).open():
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(InputError, match=message):
            RunFolder(out, config)
        with pytest.raises(InputError, match=message), early.open():
            pass
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with early.open():
        pass
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_of_two_that_looked_at_a_new_folder_the_other_configuration_is_refused(tmp_path: Path) -> None:
    one, other = (RunFolder(tmp_path / "out", {"seed": seed}) for seed in (0, 1))
    with one.open():
        pass
    with pytest.raises(InputError, match="holds a run with seed = 0, not 1"), other.open():
        pass
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"seed": 0}


def killed(out: Path) -> None:
    """Leave what a run that was killed while it wrote a stage and a picture leaves."""
    for file in (f"stages/.0-dense.{DEAD}.abcd/model/weights", f"report/.pipeline.png.{DEAD}.efgh", "report/a.png"):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("")
    (out / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "owner": DEAD}))


def test_what_a_killed_run_was_writing_goes_when_it_goes_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {}).open():
        pass
    killed(tmp_path)
    other = tmp_path / "report" / ".pipeline.png.ba9876543210.efgh"  # of another process: a report, say
    other.write_text("")
    with RunFolder(tmp_path, {}).open():
        files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {LOCK, "config.json", "report/a.png", str(other.relative_to(tmp_path))}
    assert list((tmp_path / "stages").iterdir()) == []


@pytest.mark.parametrize("names", [[LOCK], [LOCK, f".config.json.{DEAD}.x"]])
def test_a_run_killed_at_its_very_beginning_goes_on(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps({"host": "elsewhere", "pid": 1, "owner": DEAD}))
    with RunFolder(tmp_path, {}).open():
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, "config.json"}


DAMAGED = {
    "no object": (b"[1, 2]", "holds a list; expected the settings of a run"),
    "not UTF-8": (b'{"model": "\xff"}', "expected the settings of a run"),
    "too deep": (b'{"a":' * 100_000, "nested too deeply"),
    "huge int": (b'{"seed": 1' + b"0" * 5000 + b"}", "a number of thousands of digits"),
    "cut": (b'{"seed": ', "is not JSON"),
    "empty": (b"", "is not JSON"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_configuration_is_one_line(kind: str, tmp_path: Path) -> None:
    content, message = DAMAGED[kind]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        RunFolder(tmp_path, {"seed": 0})
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_pipe_instead_of_a_configuration_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="not a regular file"):
        RunFolder(tmp_path, {})


def test_a_long_or_odd_setting_is_shown_in_part(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": "x\n" * 9999}))
    with pytest.raises(InputError, match=r"with model = 'x\\nx") as error:
        RunFolder(tmp_path, {"model": "toy"})
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", None])
def test_a_damaged_stage_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    folder, stage = RunFolder(tmp_path, {}), tmp_path / "stages" / "0-dense"
    stage.mkdir(parents=True)
    for name, read in (("record.json", folder.record), ("predictions.jsonl", folder.predictions)):
        if content is not None:
            (stage / name).write_bytes(content)
        if (name, content) not in (("predictions.jsonl", b""), ("predictions.jsonl", b"[]")):
            with pytest.raises(InputError, match=name):
                read(0, "dense")
    shutil.rmtree(stage)
    stage.mkdir()
    write_jsonl(stage / "predictions.jsonl", [{"correct": 1}])
    assert folder.predictions(0, "dense") == [{"correct": 1}]


def test_lines_that_are_none_are_dropped_when_a_stage_goes_on(tmp_path: Path) -> None:
    whole = '{"run_stage": "dense", "step": 1}\n'
    deep = b"[" * 100_000
    (tmp_path / "metrics.jsonl").write_bytes(whole.encode() + b'{"run_stage": "\xff"}\n[]\n{}\n' + deep + b"\n\0\0\0")
    (tmp_path / "config.json").write_text("{}")
    RunFolder(tmp_path, {}).logger("distil")({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == whole + '{"run_stage": "distil", "step": 1}\n'
