"""File names that lead elsewhere."""

from pathlib import Path
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.files.folder import beside


def test_plain_names_only(tmp_path: Path) -> None:
    index, inside = tmp_path / "index.json", tmp_path / "part"
    inside.touch()
    assert beside(index, "part") == inside
    names: list[Any] = [f"../{tmp_path.name}/part", str(inside), "./part", ".", "..", "", "part\0", "a\\part", None, 3]
    names += ["part\n", "a" * 256, "ä" * 128, "\ud800", "\x1b[1m", ["part"]]
    for name in names:
        with pytest.raises(InputError, match="expected a plain file name in the same folder") as caught:
            beside(index, name)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()
    with pytest.raises(InputError, match="names other, which is not there"):
        beside(index, "other")
    with pytest.raises(InputError, match="which is not there"):
        beside(index, "a" * 255)
