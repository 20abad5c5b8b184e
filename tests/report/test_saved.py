"""A finished run is read back with what to be careful about, and the command that gives it again."""

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chai_jax.cli import parse
from chai_jax.config import PlanConfig, RunConfig, TrainOverrides
from chai_jax.errors import InputError
from chai_jax.report.saved import SavedRun
from chai_jax.run.pipeline import recorded_settings
from chai_jax.sources import source_of

CONFIGS = (
    RunConfig(),
    RunConfig("facebook/opt-125m", task="sst2", seed=3, planning=PlanConfig(kv_budget=0.5, ranks=False)),
    RunConfig("my models/it's", task="rte", data_dir=Path("some data"), order="", select="accuracy", limit=20),
    RunConfig(
        "m", text=Path("$(rm -rf).txt"), finetune="never", gate=0.25, planning=PlanConfig(kv_budget=0.25, pin="0,1")
    ),
    RunConfig("m", task="sst2", train=TrainOverrides(lr=1e-4, remat=True), planning=PlanConfig(share="kv", layers=0.1)),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model)
def test_the_command_gives_the_run_again(labelled_run: Path, config: RunConfig) -> None:
    """The program makes of it the configuration that the run recorded, as it does before it starts."""
    filled = dataclasses.replace(config, planning=config.planning.filled(source_of(config.model).planning))
    run = dataclasses.replace(SavedRun.read(labelled_run), config=json.loads(json.dumps(recorded_settings(filled))))
    program, *argv = shlex.split(run.command)
    parsed = parse(argv)
    again = dataclasses.replace(parsed, planning=parsed.planning.filled(source_of(parsed.model).planning))
    assert program == "chai-jax"
    assert recorded_settings(again) == recorded_settings(filled)


def test_only_what_was_asked_for_is_in_the_command(labelled_run: Path) -> None:
    filled = RunConfig("m", task="sst2", planning=PlanConfig().filled(source_of("m").planning))
    run = dataclasses.replace(SavedRun.read(labelled_run), config=recorded_settings(filled))
    assert run.command == "chai-jax run m --task sst2"


def test_half_a_line_of_a_killed_run_is_left_out(labelled_run: Path) -> None:
    assert [one["step"] for one in SavedRun.read(labelled_run).updates] == list(range(1, 31))


def test_concerns(labelled_run: Path, text_run: Path) -> None:
    run = SavedRun.read(labelled_run)
    (said,) = run.concerns
    assert "cluster" in said
    assert "majority (51.0 %)" in said
    dense = {**run.records[0], "metrics": {**run.records[0]["metrics"], "at_chance": True}}
    wrong = {**run.records[2], "kv_bytes_per_token_formula": 1}
    moved = {**run.records[3], "gate": {"kl": 0.75, "layer": 1, "layer_kl": 0.5, "tokens": 90}}
    said = "\n".join(dataclasses.replace(run, records=[dense, wrong, moved]).concerns)
    assert "every later number meaningless" in said
    assert "128 B/token, by formula 1." in said
    assert "Quantize moved the next-token distribution by 0.750" in said
    assert dataclasses.replace(run, config={"gate": 0.8}, records=[moved]).concerns == []
    (said,) = SavedRun.read(text_run).concerns
    assert "first 7" in said
    # The first of two layers is dense, so the plan takes more than half.
    tight = dataclasses.replace(run, config={"planning": {"kv_budget": 0.5}}, records=run.records[:1])
    assert "its budget was 50.0 %" in "".join(tight.concerns)


def no_config(run: Path) -> None:
    (run / "config.json").unlink()


def unfinished(run: Path) -> None:
    (run / "results.json").unlink()


def no_list(run: Path) -> None:
    (run / "results.json").write_text("{}")


def no_json(run: Path) -> None:
    (run / "results.json").write_text("[")


def no_latency(run: Path) -> None:
    records = json.loads((run / "results.json").read_text())
    del records[1]["latency"]
    (run / "results.json").write_text(json.dumps(records))


def other_plan(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["layers"], plan["sensitivity"] = plan["layers"][:1], [1.0]
    (run / "plan.json").write_text(json.dumps(plan))


DAMAGES = {
    no_config: "no run folder",
    unfinished: "not finished",
    no_list: "no list of stages",
    no_json: "cannot read",
    no_latency: "no 'latency'",
    other_plan: "the plan is for 1 layers",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_no_run_is_refused(labelled_run: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    copy = Path(shutil.copytree(labelled_run, tmp_path / "run"))
    damage(copy)
    with pytest.raises(InputError, match=DAMAGES[damage]):
        SavedRun.read(copy)
