"""Values that no option takes: each is refused in one line before any work. The command line itself is tyro's part."""

import dataclasses
import json
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chai_jax.cli import COMMANDS, main, parse
from chai_jax.commands.planning import PlanCommand
from chai_jax.config import PlanConfig, RunConfig, RunOptions, TrainOverrides
from chai_jax.errors import InputError
from chai_jax.run import folder as run_folder
from chai_jax.run.devices import parse_mesh
from chai_jax.run.pipeline import run

GROUPS = {"planning": PlanConfig, "train": TrainOverrides, "operation": RunOptions}
HUGE = 2**70


def options(kind: type) -> Iterator[tuple[str, Any]]:
    """Name and type of every option and positional argument of a command."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options(hints[field.name])
        else:
            yield field.name, hints[field.name]


def takes(hint: Any, *kinds: type) -> bool:
    return any(kind in (hint, *typing.get_args(hint)) for kind in kinds)


MODELS = {
    "bench-serve": ["x", "--model", "x"],
    "verify": ["x", "x"],
    "report": [],
    "bench": [],
    "explain": [],
    "env": [],
}
POSITIONAL = {"explain": "plan", "report": "runs"}
WITH_PATHS = [name for name, kind in COMMANDS.items() if any(takes(hint, Path) for _, hint in options(kind))]


@pytest.mark.parametrize("command", WITH_PATHS)
def test_every_path_option_is_read_alike(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is expanded, and what cannot be a path is refused at once."""
    monkeypatch.setenv("HOME", "/home/me")
    names = [name for name, hint in options(COMMANDS[command]) if takes(hint, Path)]
    words = [command, *MODELS.get(command, ["x"]), *(["~/x [/b]"] if command in POSITIONAL else [])]
    for name in names:
        words += [] if POSITIONAL.get(command) == name else [f"--{name.replace('_', '-')}", "~/x [/b]"]
    parsed = vars(parse(words))
    devices = vars(parsed.get("devices", object.__new__(PlanConfig)))
    for name in names:
        value = parsed[name] if name in parsed else devices[name]
        assert value in (Path("/home/me/x [/b]"), (Path("/home/me/x [/b]"),))
    with pytest.raises(InputError, match="begins with a user who is not known"):
        parse([word.replace("~", "~nosuch") for word in words])


class Began(Exception):
    """The work would have begun."""


@pytest.fixture
def job(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run that stops where its work would begin."""
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    rows = [{"sentence": "the plot is dull " * (1 + at // 2), "label": at % 2} for at in range(16)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def began(folder: object) -> None:
        raise Began

    monkeypatch.setattr(run_folder.RunFolder, "open", began)
    return RunConfig(str(small_model), task="sst2", data_dir=folder.parent, out=tmp_path / "out")


def with_option(config: RunConfig, name: str, value: object) -> RunConfig:
    """As the command line would change it."""
    for group, kind in GROUPS.items():
        if name in kind.__dataclass_fields__:
            changed = dataclasses.replace(getattr(config, group), **{name: value})
            return dataclasses.replace(config, **{group: changed})
    return dataclasses.replace(config, **{name: value})  # type: ignore[arg-type]


NUMBERS = {
    name: hint
    for kind in (RunConfig, *GROUPS.values())
    for name, hint in typing.get_type_hints(kind).items()
    if takes(hint, int, float)
}
ZERO = {"seed", "gate", "layers"}
ANY_SIZE = {"gate", "model_budget", "checkpoint_minutes", "max_minutes"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_a_run_that_cannot_be(name: str, job: RunConfig) -> None:
    bad: list[float] = [-1, *([] if name in ZERO else [0]), *([] if name in ANY_SIZE else [HUGE])]
    if takes(NUMBERS[name], float):
        bad = [*map(float, bad), float("nan"), float("inf")]
    for value in bad:
        with pytest.raises(InputError) as caught:
            run(with_option(job, name, value))
        assert name.replace("_", "-") in str(caught.value).replace("_", "-")
    assert job.out is not None
    assert not job.out.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 2**32 - 1), ("lr", 1e-9), ("epochs", 10_000), ("gate", 0.0), ("layers", 0.0), ("calibration", 1000)],
)
def test_numbers_of_a_run_that_can_be(name: str, value: float, job: RunConfig) -> None:
    with pytest.raises(Began):
        run(with_option(job, name, value))


def test_the_folder_of_a_run() -> None:
    """Model and data; the toy has but one task."""
    assert RunConfig().folder == RunConfig(task="toy").folder == Path("runs/toy")
    assert RunConfig(text=Path("a.txt")).folder == Path("runs/toy-text")
    assert RunConfig("facebook/opt-125m", task="sst2").folder == Path("runs/opt-125m-sst2")
    assert RunConfig("/models/mine", text=Path("a.txt")).folder == Path("runs/mine-text")
    assert RunConfig("x", task="rte", out=Path("y")).folder == Path("y")


def test_a_plan_checks_its_numbers_too() -> None:
    with pytest.raises(InputError, match=r"--seed is 4294967296; expected a whole number from 0 on, below 2\^32"):
        PlanCommand("no model", seed=2**32).run()
    with pytest.raises(InputError, match="--calibration is 0; expected at least 1"):
        PlanCommand("no model", planning=PlanConfig(calibration=0)).run()


def test_refused_on_the_command_line(
    job: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run", job.model, "--task", "sst2", "--data-dir", str(job.data_dir), "--out", str(tmp_path / "out")]
    assert main([*words, "--lr", "1e400"]) == 2
    assert capsys.readouterr().err == "error: lr is inf; expected a number above 0, up to 100\n"
    assert main([*words, "--compile-cache", "n" * 300]) == 2
    assert "File name too long" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


TEXTS = {
    "order": ["x", "dis\ntil", "distil,distil"],
    "clusters": ["x", "-1", "nan", "1e400", str(HUGE), "correlation:2"],
    "storages": ["", "x", "int8,\n1"],
    "pin": ["x", "0,1", "-1"],
    "teacher": ["", "n" * 300, "a\nb", "\ud800", "~nosuch"],
    "revision": ["", "x", "a\nb"],
    "task": ["", "x", "a\nb", "\ud800"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in TEXTS.items() for value in values])
def test_words_of_a_run_that_cannot_be(name: str, value: str, job: RunConfig) -> None:
    with pytest.raises(InputError):
        run(with_option(job, name, value))
    assert job.out is not None
    assert not job.out.exists()


@pytest.mark.parametrize("mesh", ["", "x", "1x1x1", "-1x1", "1", "9" * 5000 + "x1", f"{HUGE}x1"])
def test_meshes_that_cannot_be(mesh: str) -> None:
    with pytest.raises(InputError, match="expected DATAxMODEL, such as 8x1 or 4x2"):
        parse_mesh(mesh)


PLACES = ["dangling", "dangling/x", "loop", "file", "file/x", "fifo", "no/" + "n" * 300]


@pytest.mark.parametrize("option", ["out", "data_dir", "text", "teacher"])
@pytest.mark.parametrize("name", PLACES, ids=lambda name: name[:20])
def test_places_that_cannot_be(option: str, name: str, job: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    place = str(tmp_path / name) if option == "teacher" else tmp_path / name
    config = dataclasses.replace(job, task=None) if option == "text" else job
    with pytest.raises(InputError) as caught:
        run(with_option(config, option, place))
    assert "\n" not in str(caught.value)


def test_nothing_to_train_on(job: RunConfig) -> None:
    """All texts are alike, so that those held out leave none."""
    assert job.data_dir is not None
    rows = [{"sentence": "the plot is dull ", "label": at % 2} for at in range(16)]
    (job.data_dir / "sst2" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="sst2 leaves nothing to train on"):
        run(job)
    with pytest.raises(Began):
        run(dataclasses.replace(job, order="quantize"))
