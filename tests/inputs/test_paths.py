"""Paths that people give: what is expanded, what is refused, and what may become an output."""

import os
from pathlib import Path

import pytest

from chai_jax.errors import InputError
from chai_jax.files.atomic import check_writable, claim_file, claim_folder, write_json
from chai_jax.files.hub import resolve
from chai_jax.inputs.paths import user_path


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x/y") == tmp_path / "x" / "y"
    assert user_path("~") == tmp_path
    assert user_path("a/~") == Path("a/~")
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == resolve(Path("~/model")) == tmp_path / "model"


BAD = {
    "": "is empty",
    "a\0b": r"'a\\x00b' is no path that can be used",
    "n" * 500: r"n\.\.\. is no path that can be used \(File name too long\)",
    "/".join(["n" * 200] * 30): "File name too long",
    "~nosuch/x": "~nosuch/x begins with a user who is not known",
    "a/\udcff": r"'a/\\udcff' is not UTF-8",
    "loop/x": "Too many levels of symbolic links",
}


@pytest.mark.parametrize("given", BAD, ids=lambda given: ascii(given)[:12])
def test_paths_that_cannot_be(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for read in (user_path, resolve):
        with pytest.raises(InputError, match=BAD[given]) as caught:
            read(given)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Things that stand where an output should go."""
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to("empty")
    (tmp_path / "to-file").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


NO_FOLDER = {
    "dangling": "is a link to nothing",
    "dangling/x": "cannot write to",
    "loop": "is a link to nothing",
    "file": "already holds something",
    "fifo": "already holds something",
    "full": "already holds something",
    "file/x": "cannot write to",
    "no/" + "n" * 300: r"cannot write to .* \(File name too long\)",
    "n" * 250: r"cannot write to .* \(File name too long\)",  # its temporary sibling has a longer name
}


@pytest.mark.parametrize("name", NO_FOLDER, ids=lambda name: name[:15])
def test_what_cannot_become_a_folder(name: str, places: Path) -> None:
    before = sorted(places.iterdir())
    with pytest.raises(InputError, match=NO_FOLDER[name]):
        claim_folder(places / name)
    assert sorted(places.iterdir()) == before


def test_what_can_become_a_folder(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert claim_folder(places / "new" / "x") == places / "new" / "x"
    assert claim_folder(places / "empty") == places / "empty"
    assert claim_folder(places / "to-empty") == places / "empty"  # onto which a folder can be renamed
    monkeypatch.chdir(places / "empty")
    with pytest.raises(InputError, match="is the folder you are in"):
        claim_folder(Path())


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("dangling", "is a link to nothing"),
        ("loop", "is a link to nothing"),
        ("full", "is a folder"),
        ("fifo", "is no regular file"),
        ("file/x", "cannot write to"),
        ("n" * 250, "File name too long"),
    ],
)
def test_what_cannot_become_a_file(name: str, complaint: str, places: Path) -> None:
    with pytest.raises(InputError, match=complaint):
        claim_file(places / name)


def test_a_file_is_written_through_a_link(places: Path) -> None:
    assert claim_file(places / "new.json") == places / "new.json"
    write_json(claim_file(places / "to-file"), {"name": "caf\u00e9 \udcff"})
    assert (places / "to-file").is_symlink()
    assert (places / "file").read_bytes() == b'{\n  "name": "caf\xc3\xa9 \\udcff"\n}\n'  # half a pair as JSON has it


@pytest.mark.parametrize("name", ["dangling", "dangling/x", "loop", "file", "file/x", "fifo", "no/" + "n" * 300])
def test_what_cannot_be_written_to(name: str, places: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write to .*: choose another --samples"):
        check_writable(places / name, "--samples")
