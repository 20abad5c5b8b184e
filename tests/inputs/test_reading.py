"""Text and JSON that cannot be read, or should not be: one line each, at once, in bounded memory."""

import gzip
import os
from pathlib import Path

import pytest

from chai_jax.errors import InputError
from chai_jax.inputs.reading import open_utf8, parse_json, read_json, read_text, shown

MARK = b"\xef\xbb\xbf"  # the byte order mark


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 100_000, r"is not JSON \(nested too deeply\)"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "a number of thousands of digits"),
        (b"[1]", "holds a list; expected a JSON object"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_json(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    plain, zipped, packed = tmp_path / "a.json", tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes(MARK + b'{"a": 1}')
    zipped.write_bytes(MARK + "né\n".encode())
    packed.write_bytes(gzip.compress(MARK + "né\n".encode()))
    assert read_json(plain) == {"a": 1}
    assert read_text(zipped) == "né\n"
    for path in (zipped, packed):
        with open_utf8(path) as file:
            assert list(file) == ["né\n"]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path, tmp_path / "loop", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"cannot read .* expected a JSON object"):
            read_json(path)
        with pytest.raises(InputError, match=r"cannot read .* expected UTF-8 text"), open_utf8(path) as file:
            file.read()


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_size_is_stated_and_kept(tmp_path: Path, ending: str) -> None:
    path, data = tmp_path / f"a{ending}", b"x" * 100_000
    path.write_bytes(gzip.compress(data) if ending else data)
    with open_utf8(path, most=100_000) as file:
        assert file.read() == "x" * 100_000
    with pytest.raises(InputError, match="more bytes than are read"), open_utf8(path, most=99_999) as file:
        file.read()
    if not ending:
        with pytest.raises(OSError, match="more than 99,999 bytes"):
            read_text(path, most=99_999)


def test_json_that_is_valid_and_too_much() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
    assert parse_json("[1, 1e400]") == [1, float("inf")]


def test_paths_are_shown_on_one_line() -> None:
    assert shown(Path("a/ü b")) == "a/ü b"
    assert shown("a\nb") == "'a\\nb'"
    assert len(shown("x" * 5000)) == 300
