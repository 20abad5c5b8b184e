"""Small files that are damaged, and file names that lead elsewhere."""

from pathlib import Path
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.files.folder import beside, read_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds a list; expected a JSON object"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(path)


def test_plain_names_only(tmp_path: Path) -> None:
    index, inside = tmp_path / "index.json", tmp_path / "part"
    inside.touch()
    assert beside(index, "part") == inside
    names: list[Any] = [f"../{tmp_path.name}/part", str(inside), "./part", ".", "..", "", "part\0", "a\\part", None, 3]
    for name in names:
        with pytest.raises(InputError, match="expected a plain file name in the same folder"):
            beside(index, name)
    with pytest.raises(InputError, match="names other, which is not there"):
        beside(index, "other")
