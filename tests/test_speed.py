"""The speed that a user sees, as the script times it: a row for whoever fits, and a word on who does not."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chai_jax.errors import InputError
from chai_jax.model.cache import cache_bytes

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("speed")


def options(speed: Any, model: Path, folder: Path, **changes: Any) -> Any:
    small: dict[str, Any] = {"batches": "1,2", "contexts": "24", "steps": 4, "rounds": 2, "seeds": "0", "peer": False}
    return speed.SpeedOptions((str(model),), out=folder, **{**small, **changes})


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "speed.json").read_text(encoding="utf-8"))["rows"]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own making
def test_all_that_fit_take_turns(speed: Any, small_model: Path, tmp_path: Path, torch: ModuleType) -> None:
    speed.speed(options(speed, small_model, tmp_path, storages="int8", peer=True))
    found = rows(tmp_path)
    names = ["bfloat16", "int8", "transformers"]
    decoded = [row for row in found if row["part"] == "decode"]
    assert [(row["batch"], row["cache"]) for row in decoded] == [(batch, name) for batch in (1, 2) for name in names]
    assert [row["cache"] for row in found if row["part"] == "first"] == names
    assert (tmp_path / f"{small_model.name}-tokens-a-second.png").stat().st_size > 0
    models = dict(speed.caches(str(small_model), "int8", ()))
    for row in decoded:
        assert row["n"] == 2
        assert row["rate"]["median"] == pytest.approx(1e3 * row["batch"] / row["ms"]["median"])
        if row["cache"] in models:
            assert row["bytes"]["kv"] == cache_bytes(models[row["cache"]].spec, row["batch"], 24)
        else:
            assert row["bytes"]["kv"] == 2 * cache_bytes(models["bfloat16"].spec, row["batch"], 24)  # float32
    assert all(row["ratio"]["median"] == 1 for row in found if row["cache"] == "bfloat16")


def test_what_has_no_room_is_named(speed: Any, small_model: Path, tmp_path: Path) -> None:
    model = dict(speed.caches(str(small_model), "", ()))["bfloat16"]
    both = model.nbytes + cache_bytes(model.spec, 2, 24)
    few = options(speed, small_model, tmp_path, storages="int8", parts="decode", memory=1.5 * both / 2**30)
    speed.speed(few)
    told = {(row["batch"], row["cache"]): row.get("absent", "timed") for row in rows(tmp_path)}
    assert told == {
        (1, "bfloat16"): "timed", (1, "int8"): "no room beside the others",
        (2, "bfloat16"): "timed", (2, "int8"): "no room beside the others",
    }  # fmt: skip


def test_the_largest_batch_is_decoded(speed: Any, small_model: Path, tmp_path: Path) -> None:
    model = dict(speed.caches(str(small_model), "", ()))["bfloat16"]
    room = (model.nbytes + 3.5 * cache_bytes(model.spec, 1, 24)) / 2**30
    speed.speed(options(speed, small_model, tmp_path, parts="largest", memory=room))
    (row,) = rows(tmp_path)
    assert (row["fits"], row["batch"], row["context"]) == (3, 3, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 24}, "not fewer than the tokens"),
        ({"rounds": 0}, "at least one of"),
        ({"parts": "sleep"}, "expected"),
        ({"contexts": "100000"}, "do not fit"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    speed: Any, small_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        speed.speed(options(speed, small_model, tmp_path, **changes))
