"""A file or folder is there whole or not at all."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.files import atomic
from chai_jax.files.atomic import new_file, new_folder, owner, write_json


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_that_another_process_made_meanwhile_stays(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    theirs = out / "weights" if kind == "folder" else out

    def write() -> None:
        with new_folder(out) as mine:
            (mine / "weights").write_text("mine")
            theirs.parent.mkdir(exist_ok=True)
            theirs.write_text("theirs")

    with pytest.raises(InputError, match="out already holds something"):
        write()
    assert theirs.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [out]


def test_what_else_fails_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("")
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "out"):
        (tmp_path / "a").replace(tmp_path / "b")


@pytest.mark.parametrize("writing", [new_file, new_folder])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left (os error 28)")])
def test_a_full_disk_is_an_error_that_names_what_was_written(writing: Any, error: Exception, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/out'$"), writing(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_another_kind_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="weights"), new_folder(tmp_path / "out"):
        raise KeyError("weights")


def test_a_fork_has_a_mark_of_its_own() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(owner).result() == owner()
    assert atomic._mark(os.getpid()) == owner() != atomic._mark(os.getpid() + 1)


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)  # 254 bytes, of 255
    with new_file(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


def test_a_name_that_is_not_utf8_comes_back(tmp_path: Path) -> None:
    value = {"text": b"caf\xe9.txt".decode("utf-8", "surrogateescape")}
    write_json(tmp_path / "config.json", value)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == value
