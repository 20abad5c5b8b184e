"""A stage that is stopped and gone on with ends with the bits of one that was not, and refuses what is not its own."""

import dataclasses
import errno
import gc
import itertools
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from orbax.checkpoint._src.serialization import serialization

from chai_jax.adapt import checkpoints as keeping
from chai_jax.adapt.checkpoints import Keeper
from chai_jax.adapt.distil import distil
from chai_jax.adapt.finetune import finetune
from chai_jax.adapt.fingerprint import checksums, first_difference
from chai_jax.config import Checkpoints, DistilConfig, FinetuneConfig, TrainConfig
from chai_jax.data.batches import Encoded
from chai_jax.errors import EXIT_STOPPED, InputError, Stopped
from chai_jax.model.model import Model
from chai_jax.model.sharding import Layout, make_mesh
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan

pytestmark = pytest.mark.slow  # together they take a minute

Build = Callable[..., Model]
CONFIG = FinetuneConfig(TrainConfig(lr=1e-3, batch=8, accumulation=2, epochs=4))  # eight updates
Log = list[dict[str, Any]]


class Killed(Exception):
    """Stands for SIGKILL: nothing of ours catches it. What was being written may or may not get done."""


def stop_after(step: int, log: Log) -> Callable[[dict[str, Any]], None]:
    """A log that ends the program after an update, before its state is saved."""

    def note(record: dict[str, Any]) -> None:
        log.append(record)
        if record["step"] == step:
            raise Killed

    return note


def assert_identical(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every call compiles the same programs anew; here it finds them on disk."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is settings:
            yield


@pytest.fixture(scope="module")
def undisturbed(tiny: Build, examples: list[Encoded]) -> tuple[Model, Log]:
    log: Log = []
    return finetune(tiny(), examples, CONFIG, log.append), log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def interrupted(tiny: Build, examples: list[Encoded], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of updates 3 and 4 of a stage that was killed in its fifth; to be copied."""
    path = tmp_path_factory.mktemp("interrupted") / "checkpoints"
    with pytest.raises(Killed):
        finetune(
            tiny(),
            examples,
            CONFIG,
            stop_after(5, []),
            checkpoints=Checkpoints(path, every=1, keep=2),
        )
    return path


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_keeps_the_newest(interrupted: Path) -> None:
    assert steps(interrupted) == [3, 4]
    assert not list(interrupted.glob("*tmp*"))


def test_goes_on_to_the_same_bits(
    undisturbed: tuple[Model, Log], tiny: Build, examples: list[Encoded], folder: Path
) -> None:
    """Killed in updates 3, 4 and 7, and once more after the last; the losses it logs are those of one run."""
    log: Log = []
    for step in (3, 4, 7):
        with pytest.raises(Killed):
            finetune(tiny(), examples, CONFIG, stop_after(step, log), checkpoints=Checkpoints(folder, 1))
    for _ in range(2):
        after = finetune(tiny(), examples, CONFIG, log.append, checkpoints=Checkpoints(folder, 1))
        assert_identical(after.params, undisturbed[0].params)
    assert [record["step"] for record in log] == [1, 2, 3, 3, 4, 4, 5, 6, 7, 7, 8]
    of = {record["step"]: record["loss"] for record in undisturbed[1]}
    assert all(record["loss"] == of[record["step"]] for record in log)


@pytest.mark.slow
def test_restores_onto_other_devices(
    undisturbed: tuple[Model, Log], tiny: Build, examples: list[Encoded], interrupted: Path, folder: Path
) -> None:
    shutil.copytree(interrupted, folder)
    log: Log = []
    other = tiny(layout=Layout(make_mesh(data=2, model=2)))
    finetune(other, examples, CONFIG, log.append, checkpoints=folder)
    assert [record["step"] for record in log] == [5, 6, 7, 8]
    expected = [record["loss"] for record in undisturbed[1][4:]]
    np.testing.assert_allclose([record["loss"] for record in log], expected, rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_moments_and_int8_weights_come_back(tiny: Build, examples: list[Encoded], folder: Path) -> None:
    model = tiny(dtype=jnp.bfloat16, int8=(0,), storage="int8")
    teacher = tiny(1)
    config = DistilConfig(TrainConfig(lr=1e-3, batch=8, accumulation=1, epochs=2, moments="bfloat16"))
    plain = distil(model, teacher, examples, config)
    with pytest.raises(Killed):
        distil(model, teacher, examples, config, stop_after(3, []), checkpoints=Checkpoints(folder, 1))
    assert_identical(distil(model, teacher, examples, config, checkpoints=folder).params, plain.params)


FILES = ("about/metadata", "state/manifest.ocdbt", "state/_METADATA", "state/d", "state", "about")


@pytest.mark.parametrize(("name", "damage"), [*itertools.product(FILES, ["delete", "cut"]), ("state/d", "flip")])
def test_a_damaged_newest_falls_back(name: str, damage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    states = [{"x": jnp.asarray(random.standard_normal(500), jnp.float32), "n": jnp.int32(step)} for step in (1, 2)]
    about, where = {"stage": "test"}, Checkpoints(folder, every=1)
    with Keeper(where, about) as keeper:
        for step, state in enumerate(states, 1):
            keeper.after(step, 2, state)
    victim = folder / "2" / name
    files = [path for path in [victim, *victim.rglob("*")] if path.is_file()]
    for file in files:
        content = bytearray(file.read_bytes())
        half = len(content) // 2
        file.unlink() if damage == "delete" else file.write_bytes(content[:half])
        if damage == "flip":
            file.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    with Keeper(where, about) as keeper:
        step, state = keeper.restore(jax.eval_shape(lambda: states[0]))
        keeper.after(2, 2, states[1])
    errors = " ".join(capsys.readouterr().err.split())
    if step == 1:
        assert_identical(state, states[0])
        assert "the checkpoint of update 2 is damaged" in errors
        assert "going on from the checkpoint of update 1" in errors
    else:  # the file was not needed
        assert_identical(state, states[1])
        assert (name, damage) == ("state/_METADATA", "delete")
    assert "Traceback" not in errors
    assert steps(folder) == [1, 2]


def test_contents_that_changed_unseen_are_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Orbax's own checks see a flipped bit of a file; ours see what was wrong before it was written."""
    states = [{"x": jnp.full(9, float(step))} for step in (1, 2)]
    with Keeper(Checkpoints(folder, every=1), {}) as keeper:
        keeper.after(1, 2, states[0])
        monkeypatch.setattr(keeping, "checksums", lambda _: checksums(states[0]))
        keeper.after(2, 2, states[1])
    monkeypatch.undo()
    with Keeper(folder, {}) as keeper:
        step, state = keeper.restore(jax.eval_shape(lambda: states[0]))
    assert step == 1
    assert_identical(state, states[0])
    assert "do not have the checksums" in capsys.readouterr().err


@pytest.mark.slow
def test_if_all_are_damaged_the_stage_begins_again(
    interrupted: Path,
    undisturbed: tuple[Model, Log],
    tiny: Build,
    examples: list[Encoded],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(interrupted, folder)
    for step in (3, 4):
        (folder / str(step) / "about" / "metadata").write_text("{")
    log: Log = []
    after = finetune(tiny(), examples, CONFIG, log.append, checkpoints=Checkpoints(folder, keep=1))
    assert log[0]["step"] == 1
    assert_identical(after.params, undisturbed[0].params)
    assert capsys.readouterr().err.count("is damaged") == 2
    assert steps(folder) == [8]


def other_rate(config: TrainConfig, model: Model, examples: list[Encoded]) -> Any:
    return dataclasses.replace(config, lr=2e-3), model, examples


def other_shape(config: TrainConfig, model: Model, examples: list[Encoded]) -> Any:
    params = model.params | {"embed": model.params["embed"] | {"positions": jnp.ones((10, 16))}}
    return config, model.replace(config=dataclasses.replace(model.config, max_positions=8), params=params), examples


def other_storage(config: TrainConfig, model: Model, examples: list[Encoded]) -> Any:
    return config, model.replace(spec=model.spec.dense(1, 2, 8, "int8")), examples


def other_weights(config: TrainConfig, model: Model, examples: list[Encoded]) -> Any:
    bias = model.params["final_norm"]["bias"]
    norm = model.params["final_norm"] | {"bias": bias.at[3].set(jnp.nextafter(bias[3], jnp.inf))}
    return config, model.replace(params=model.params | {"final_norm": norm}), examples


def other_data(config: TrainConfig, model: Model, examples: list[Encoded]) -> Any:
    return config, model, [*examples[:-1], Encoded((*examples[-1].tokens[:-1], 7), examples[-1].start)]


DIFFERENCES = {
    other_rate: r"settings\.train\.lr is 0\.001 there and 0\.002 here",
    other_shape: r"model\.max_positions is 32 there and 8 here",
    other_storage: r"spec\.layers\.0\.groups\.0\.storage is 'float32' there and 'int8' here",
    other_weights: r"weights\.trained\.final_norm\.bias is \d+ there",
    other_data: "examples is '",
}


@pytest.mark.parametrize("change", DIFFERENCES, ids=lambda change: change.__name__)
def test_checkpoints_of_another_training_are_refused(
    change: Any, interrupted: Path, tiny: Build, examples: list[Encoded]
) -> None:
    config, model, rows = change(CONFIG.train, tiny(), [example for example in examples if len(example.tokens) < 9])
    before = sorted(interrupted.rglob("*"))
    if change is not other_shape:
        rows = change(CONFIG.train, tiny(), examples)[2]
    with pytest.raises(InputError, match=f"holds checkpoints of another training: {DIFFERENCES[change]}"):
        finetune(model, rows, FinetuneConfig(config), checkpoints=interrupted)
    assert sorted(interrupted.rglob("*")) == before


@pytest.mark.slow
def test_another_stage_and_teacher_are_refused(
    interrupted: Path, tiny: Build, examples: list[Encoded], folder: Path
) -> None:
    with pytest.raises(InputError, match="stage is 'finetune' there and 'distil' here"):
        distil(tiny(), tiny(), examples, checkpoints=interrupted)
    config = DistilConfig(TrainConfig(batch=16, max_steps=1))
    distil(tiny(), tiny(1), examples, config, checkpoints=folder)
    with pytest.raises(InputError, match=r"weights\.beside\.embed\.positions is \d+ there"):
        distil(tiny(), tiny(2), examples, config, checkpoints=folder)


def test_another_plan_is_refused(tiny: Build, examples: list[Encoded], folder: Path) -> None:
    layer = LayerPlan(tuple(ClusterPlan((head,), head) for head in range(2)))
    config = FinetuneConfig(TrainConfig(batch=16, max_steps=1))
    planned = tiny().replace(plan=Plan((layer,)))
    finetune(planned, examples, config, checkpoints=folder)
    edited = planned.replace(plan=Plan((dataclasses.replace(layer, tier="low"),)))
    with pytest.raises(InputError, match=r"plan\.layers\.0\.tier is 'high' there and 'low' here"):
        finetune(edited, examples, config, checkpoints=folder)


@pytest.mark.parametrize("where", ["in the call", "in the background"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_survives(
    where: str,
    undisturbed: tuple[Model, Log],
    tiny: Build,
    examples: list[Encoded],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(record: dict[str, Any]) -> None:
        if record["step"] == 4 and where == "in the call":
            monkeypatch.setattr(keeping.ocp.CheckpointManager, "save", full)
        elif record["step"] == 4:
            monkeypatch.setattr(serialization, "async_serialize_from_host", full)

    whole = "[23]"  # in the background, update 3 may have been written or not when the disk was full
    with pytest.raises(InputError, match=f"No space left on device.*; the checkpoint of update {whole} is whole: make"):
        finetune(tiny(), examples, CONFIG, fill, checkpoints=Checkpoints(folder, 1))
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.undo()
    with warnings.catch_warnings():  # of writes that Orbax never began: found here, not in some later test
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()
    after = finetune(tiny(), examples, CONFIG, checkpoints=Checkpoints(folder, 1))
    assert_identical(after.params, undisturbed[0].params)


def test_sigterm_saves_and_exits_with_a_status_of_its_own(
    undisturbed: tuple[Model, Log],
    tiny: Build,
    examples: list[Encoded],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def terminate(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        finetune(tiny(), examples, CONFIG, terminate, checkpoints=folder)
    assert stopped.value.code == EXIT_STOPPED == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped after update 5 of 8 (SIGTERM)" in " ".join(capsys.readouterr().err.split())
    assert steps(folder) == [5]
    log: Log = []
    after = finetune(tiny(), examples, CONFIG, log.append, checkpoints=folder)
    assert [record["step"] for record in log] == [6, 7, 8]
    assert_identical(after.params, undisturbed[0].params)


def test_stops_when_the_time_is_up(
    tiny: Build, examples: list[Encoded], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A deadline that has passed allows one update, so that any number of short turns gets to the end."""
    config = FinetuneConfig(TrainConfig(batch=8, accumulation=2, epochs=1))
    over = Checkpoints(folder, deadline=time.monotonic())
    for step in (1, 2):
        with pytest.raises(Stopped):
            finetune(tiny(), examples, config, checkpoints=over)
        assert steps(folder)[-1] == step
    assert "stopped after update 2 of 2 (the time is up)" in " ".join(capsys.readouterr().err.split())
    finetune(tiny(), examples, config, checkpoints=over)


def test_trains_outside_the_main_thread(folder: Path) -> None:
    """Where signals cannot be heard."""

    def work() -> None:
        with Keeper(folder, {}) as keeper:
            keeper.after(1, 1, {"x": jnp.ones(2)})

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert steps(folder) == [1]


@pytest.mark.parametrize(
    ("when", "expected"),
    [({"minutes": 1e-9}, [1, 2, 3, 4, 5]), ({"every": 2, "minutes": None}, [2, 4, 5]), ({"minutes": 99.0}, [5])],
)
def test_saves_when_due_and_at_the_end(folder: Path, when: dict[str, Any], expected: list[int]) -> None:
    with Keeper(Checkpoints(folder, keep=9, **when), {}) as keeper:
        for step in range(1, 6):
            keeper.after(step, 5, {"x": jnp.full(2, float(step))})
    assert steps(folder) == expected


def test_checksums_see_every_bit_and_no_mesh(tiny: Build) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6, 4)), jnp.float32)
    before = checksums({"x": x})
    split = jax.device_put(x, jax.NamedSharding(make_mesh(data=4, model=2), jax.P("data", "model")))
    assert checksums({"x": split}) == before
    bits = np.array(x).view(np.uint32)
    for bit in range(32):
        changed = bits.copy()
        changed[7, 5, 3] ^= np.uint32(1) << np.uint32(bit)
        assert checksums({"x": jnp.asarray(changed.view(np.float32))}) != before
    assert checksums({"x": x[::-1]}) != before
    leaves = {"a": jnp.ones(3, jnp.int8), "b": {"c": jnp.ones((), jnp.int32), "d": jnp.ones(2, jnp.bfloat16)}}
    assert set(checksums(leaves)) == {"a", "b.c", "b.d"}


def test_the_first_difference() -> None:
    one = {"a": {"b": [1, {"c": 2}]}, "d": 3}
    assert first_difference(one, {"a": {"b": [1, {"c": 2}]}, "d": 3}) is None
    assert first_difference(one, {"a": {"b": [1, {"c": 5}]}, "d": 4}) == "a.b.1.c is 2 there and 5 here"
    assert first_difference(one, {"a": {"b": [1]}, "d": 3}) == "a.b is [1, {'c': 2}] there and [1] here"
    assert first_difference(one, {"a": {"b": [1, {"c": 2}]}}) == "d is 3 there and 'nothing' here"


@pytest.mark.parametrize(("setting", "value"), [("every", 0), ("minutes", 0.0), ("keep", 0)])
def test_settings_out_of_range(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{setting} is"):
        Checkpoints("x", **{setting: value})
