"""A run leaves what it promises, survives a kill at any moment, and stages compose in any order."""

import hashlib
import itertools
import json
import os
import shutil
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from chai_jax.adapt import checkpoints
from chai_jax.config import PlanConfig, RunConfig, RunOptions, TrainOverrides
from chai_jax.data.batches import encode
from chai_jax.data.multiple_choice import Task
from chai_jax.data.tasks import get_task, load_rows
from chai_jax.data.toy import toy_rows
from chai_jax.errors import InputError, Stopped
from chai_jax.files.atomic import read_jsonl
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.report.saved import SavedRun
from chai_jax.run import pipeline, stages
from chai_jax.run.folder import RunFolder

TIMES = ("seconds", "latency")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's rows under the name of SST-2."""
    folder = tmp_path_factory.mktemp("data") / "sst2"
    folder.mkdir()
    for split, count in (("train", 96), ("validation", 32)):
        lines = [json.dumps(row) + "\n" for row in toy_rows(split, count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder.parent


def job(model: Path, data: Path, out: Path, **changes: Any) -> RunConfig:
    settings = {
        "task": "sst2",
        "data_dir": data,
        "finetune": "never",
        "planning": PlanConfig(layers=1.0, clusters="2", calibration=8),
        "train": TrainOverrides(lr=1e-3, batch=8, accumulation=2, max_steps=2),
    }
    return RunConfig(str(model), out=out, **{**settings, **changes})


def results(out: Path) -> list[dict[str, Any]]:
    """The records of a run without what a clock measured."""
    records = json.loads((out / "results.json").read_text())
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of one run is enough: its pictures take seconds."""
    monkeypatch.setattr(pipeline, "write_page", lambda folders, out, keep: None)


@pytest.fixture(scope="session")
def undisturbed(small_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    pipeline.run(job(small_model, data, out))
    return out


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    names = {
        "config.json",
        "plan.json",
        "sensitivity.json",
        "results.json",
        "metrics.jsonl",
        "model",
        "report",
        "stages",
    }
    assert {path.name for path in undisturbed.iterdir()} == names
    records = json.loads((undisturbed / "results.json").read_text())
    assert [record["stage"] for record in records] == ["dense", "cluster", "distil", "quantize", "target"]
    for record in records:
        assert record["metrics"]["n"] == 32
        assert record["kv_bytes_per_token"] == record["kv_bytes_per_token_formula"]
        assert record["latency"]["decode_ms_per_token"]["median"] > 0
    # 2 layers, keys and values, 4 heads of 8 in bfloat16; then 2 of the 4 heads
    assert records[0]["kv_bytes_per_token"] == 2 * 2 * 4 * 8 * 2 == records[0]["kv_bytes_per_token_dense_bfloat16"]
    assert records[1]["kv_bytes_per_token"] == records[0]["kv_bytes_per_token"] // 2
    assert records[1]["kv_reduction"] == 0.5
    assert records[3]["kv_bytes_per_token"] < records[1]["kv_bytes_per_token"]
    assert records[3]["model_bytes"] < records[1]["model_bytes"] < records[0]["model_bytes"]
    assert "flips" in records[1]["metrics"]
    pictures = ("heads", "losses", "pareto", "pipeline", "radar", "sensitivity", "stages", "tradeoff")
    files = {"report.html", "results.md", "results.csv"}
    files |= {f"{name}.{kind}" for name in pictures for kind in ("png", "svg", "csv")}
    assert {path.name for path in (undisturbed / "report").iterdir()} == files
    assert (undisturbed / "report" / "report.html").read_text().count("<img ") == len(pictures)
    steps = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [(step["run_stage"], step["step"]) for step in steps] == [
        ("distil", 1),
        ("distil", 2),
        ("target", 1),
        ("target", 2),
    ]
    assert all(step["step_s"] > 0 and step["tokens_per_s"] > 0 for step in steps)


@pytest.mark.slow
def test_interrupted_anywhere_it_ends_the_same(
    undisturbed: Path, small_model: Path, data: Path, tmp_path: Path, kill: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before every write of a stage and of the results, then repeat the command: file by file the same folder."""
    out = tmp_path / "run"
    wanted = job(small_model, data, out)
    for place, method in (("RunFolder", "finish"), ("Pipeline", "report")):
        kind = getattr(pipeline, place)
        real = getattr(kind, method)
        calls = 0

        def stop(self: Any, *arguments: Any, real: Any = real) -> Any:
            nonlocal calls
            calls += 1
            if calls % 2:
                raise KeyboardInterrupt
            return real(self, *arguments)

        monkeypatch.setattr(kind, method, stop)
    for _ in range(12):
        try:
            pipeline.run(wanted)
            break
        except KeyboardInterrupt:
            continue
    found = kill.differences(undisturbed, out)
    assert [name for name in found if not name.startswith("report/")] == []


@pytest.mark.slow
def test_stopped_after_every_update_it_ends_the_same(
    undisturbed: Path, small_model: Path, data: Path, tmp_path: Path, kill: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGTERM would; what a stage keeps while it is under way is gone at its end."""
    out = tmp_path / "run"
    monkeypatch.setattr(checkpoints, "terminated", lambda: True)
    stops = 0
    while True:
        try:
            pipeline.run(job(small_model, data, out, operation=RunOptions(checkpoint_every=1)))
            break
        except Stopped:
            stops += 1
            (partial,) = (out / "stages").glob("*.partial")
            assert (partial / "checkpoints").is_dir()
    assert stops == 4
    found = kill.differences(undisturbed, out)
    assert [name for name in found if not name.startswith("report/")] == []


def test_a_run_whose_time_is_up_stops_before_the_next_stage(small_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pipeline.run(job(small_model, data, tmp_path / "out", operation=RunOptions(max_minutes=1e-9)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["seed"] == 0


def test_each_step_is_logged_once(tmp_path: Path) -> None:
    """An attempt that goes on from step 3 drops what an earlier one left from there on, cut lines and all."""
    folder = RunFolder(tmp_path, {})
    for stage, steps in (("distil", (1, 2, 3, 4)), ("target", (1, 2))):
        log = folder.logger(stage)
        for step in steps:
            log({"step": step, "attempt": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"run_stage": "dis')
    log = folder.logger("distil")
    log({"step": 3, "attempt": 2})
    log({"step": 4, "attempt": 2})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run_stage"], line["step"], line["attempt"]) for line in lines] == [
        ("distil", 1, 1),
        ("distil", 2, 1),
        ("target", 1, 1),
        ("target", 2, 1),
        ("distil", 3, 2),
        ("distil", 4, 2),
    ]


@pytest.mark.parametrize("edited", [False, True])
def test_a_given_plan_is_the_one_the_run_began_with(
    edited: bool, undisturbed: Path, small_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps what the first attempt measured; another plan under the same name is refused."""
    plan = json.loads((undisturbed / "plan.json").read_text())
    measured = plan.pop("measured")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    wanted = job(small_model, data, tmp_path / "out", plan=tmp_path / "plan.json", order="")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "report", lambda self: {})
        pipeline.run(wanted)
    if not edited:
        assert [stage["stage"] for stage in pipeline.run(wanted)["stages"]] == ["dense", "cluster"]
    else:
        plan["layers"][0]["tier"] = {"high": "low"}.get(plan["layers"][0]["tier"], "high")
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(InputError, match="is not the plan that the run in"):
            pipeline.run(wanted)
    for place in ("", "stages/1-cluster/model"):
        assert json.loads((tmp_path / "out" / place / "plan.json").read_text())["measured"] == measured


@pytest.mark.parametrize("content", ["", "[", "{}", "[1]", "[" * 100_000, "[1" + "0" * 5000 + "]", "\xff", "[{}]"])
def test_torn_results_are_one_line_and_can_be_made_again(
    content: str, undisturbed: Path, small_model: Path, data: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    (out / "results.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"results\.json.*delete it and repeat the run's command") as error:
        pipeline.run(job(small_model, data, out))
    assert "\n" not in str(error.value)
    if content == "[":
        (out / "results.json").unlink()
        pipeline.run(job(small_model, data, out))
        assert results(out) == results(undisturbed)
        assert not (out / "report" / "report.html").exists()  # it showed the old ones; the new one is not drawn here


@pytest.mark.slow
def test_a_report_may_be_asked_for_at_any_moment_of_a_run(small_model: Path, data: Path, tmp_path: Path) -> None:
    out, heard, done = tmp_path / "out", set[str](), threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                SavedRun.read(out)
            except InputError as error:
                heard.add(str(error).split("(")[-1][:24].split(":")[0])

    reader = threading.Thread(target=look)
    reader.start()
    pipeline.run(job(small_model, data, out))
    done.set()
    reader.join()
    assert heard == {"no config.json); expecte", "no results.json)"}
    assert len(SavedRun.read(out).records) == 5


def test_repeating_a_finished_run_computes_nothing(
    undisturbed: Path, small_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (undisturbed / "results.json").read_bytes()
    monkeypatch.setattr(stages, "distil", None)
    monkeypatch.setattr(pipeline, "latency", None)
    summary = pipeline.run(job(small_model, data, undisturbed))
    assert (undisturbed / "results.json").read_bytes() == before
    assert [stage["stage"] for stage in summary["stages"]] == ["dense", "cluster", "distil", "quantize", "target"]


def test_another_configuration_is_refused(undisturbed: Path, small_model: Path, data: Path) -> None:
    with pytest.raises(InputError, match="holds a run with seed = 0, not 1"):
        pipeline.run(job(small_model, data, undisturbed, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [",".join(order) for order in itertools.permutations(("distil", "quantize", "target"))]
)
def test_every_order_runs(order: str, small_model: Path, data: Path, tmp_path: Path) -> None:
    pipeline.run(job(small_model, data, tmp_path / "out", order=order))
    assert [record["stage"] for record in results(tmp_path / "out")] == ["dense", "cluster", *order.split(",")]


def test_choosing_a_stage() -> None:
    times, sizes, errors = (9.0, 3.0, 1.0, 2.0), (80, 20, 40, 20), (0.0, 0.3, 0.2, 0.1)
    records = [
        {"stage": name, "kv_bytes_per_token": size, "latency": {"decode_ms_per_token": {"median": time}}}
        for name, size, time in zip(("dense", "cluster", "distil", "quantize"), sizes, times, strict=True)
    ]
    cost = dict(zip(("dense", "cluster", "distil", "quantize"), errors, strict=True))
    wanted = {"last": 3, "latency": 2, "size": 3, "accuracy": 3}
    assert {select: pipeline.choose(select, records, cost.__getitem__) for select in wanted} == wanted


@pytest.mark.slow
def test_a_model_at_chance_is_tuned_first(
    small_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pipeline.run(job(small_model, data, out, finetune="auto", order=""))
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["run_stage"] for step in steps] == ["dense", "dense"]
    # Two updates do not make a random model better than the majority label, and the run says so.
    assert "warning" in capsys.readouterr().err
    assert [record["stage"] for record in results(out)] == ["dense", "cluster"]


@pytest.mark.slow
def test_text_instead_of_a_task(small_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(row["sentence"] for row in toy_rows("train", 120)))
    wanted = job(small_model, tmp_path, tmp_path / "out", task=None, data_dir=None, text=text, order="distil,quantize")
    pipeline.run(wanted)
    records = results(tmp_path / "out")
    assert [record["stage"] for record in records] == ["dense", "cluster", "distil", "quantize"]
    assert all(record["metrics"]["perplexity"] > 1 for record in records)
    assert records[1]["metrics"]["difference"] != 0


@pytest.mark.slow
def test_clusters_per_prompt_through_all_stages(small_model: Path, data: Path, tmp_path: Path) -> None:
    planning = PlanConfig("qk", "prompt", warmup_tokens=3, layers=1.0, clusters="2", calibration=8)
    pipeline.run(job(small_model, data, tmp_path / "out", planning=planning, order="distil,quantize"))
    records = results(tmp_path / "out")
    assert [record["kv_bytes_per_sequence"] for record in records] == [0] + [2 * (4 + 2) * 4] * 3
    assert records[1]["kv_bytes_per_token"] == 2 * (2 + 4) * 8 * 2
    for record in records:
        assert record["kv_bytes_per_token"] == record["kv_bytes_per_token_formula"]
    layer = json.loads((tmp_path / "out/model/spec.json").read_text())["layers"][0]
    assert (layer["membership"], layer["warmup"]) == ("prompt", 3)


@pytest.fixture(scope="session")
def finished(request: pytest.FixtureRequest) -> Path:
    """The folder of a run: the one that CHAI_JAX_TEST_RUN names, or a small one."""
    named = os.environ.get("CHAI_JAX_TEST_RUN")
    return Path(named or request.getfixturevalue("undisturbed"))


def scored_apart(model: Model, task: Task, rows: list[dict[str, Any]]) -> np.ndarray:
    """Log-likelihoods [row, answer], by one uncached forward pass and in float64 from its logits on."""
    requests = [task.question(row) for row in rows]
    encoded = [encode(model.tokenizer, each.context, choice) for each in requests for choice in each.choices]
    longest = max(len(one.tokens) for one in encoded)
    tokens = np.array([[*one.tokens, *[1] * (longest - len(one.tokens))] for one in encoded], np.int32)
    lengths = np.array([[len(one.tokens)] for one in encoded])
    logits = np.asarray(model(tokens, np.arange(longest) < lengths), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = [
        sum(logprobs[at, place - 1, one.tokens[place]] for place in range(one.start, len(one.tokens)))
        for at, one in enumerate(encoded)
    ]
    return np.array(found).reshape(len(rows), -1)


def test_the_scores_of_a_run_are_those_of_its_models(finished: Path) -> None:
    """Stage by stage, of the model that the stage left."""
    config, records = json.loads((finished / "config.json").read_text()), results(finished)
    task = get_task(config["task"] or "toy")
    rows = load_rows(task, "validation", config["data_dir"])
    labels = np.array([row["label"] for row in rows])
    # Other programs than the run's: keys and values between two steps of bfloat16 or int8 may fall to either side.
    losses, bound = [], 1e-3 if "CHAI_JAX_TEST_RUN" in os.environ else 1e-5
    for at, record in enumerate(records):
        folder = finished / "stages" / f"{at}-{record['stage']}"
        expected = scored_apart(load(folder / "model"), task, rows)
        found = np.array([sample["loglikelihoods"] for sample in read_jsonl(folder / "predictions.jsonl")])
        np.testing.assert_allclose(found, expected, atol=50 * bound)
        losses.append(-expected[np.arange(len(rows)), labels].mean())
        assert record["metrics"]["loss"] == pytest.approx(losses[-1], abs=bound)
    assert len(set(losses)) == len(losses)  # each stage changed the model
    if config["model"] == "toy":  # which is trained until it can tell good from bad, and compressed until it hardly can
        accuracies = {record["stage"]: record["metrics"]["acc"] for record in records}
        assert accuracies["dense"] > 0.88
        assert accuracies["cluster"] < accuracies["distil"]
        assert accuracies["target"] > accuracies["dense"] - 0.1


SST2_FILE = r"""
context: "{{sentence}}\nQuestion: Is this sentence positive or negative?\nAnswer:"
choices: [negative, positive]
train: sst2/train.jsonl
validation: sst2/validation.jsonl
"""


@pytest.mark.slow
def test_a_task_file_is_calibrated_trained_and_scored_on_like_a_task_that_is_built_in(
    undisturbed: Path, small_model: Path, data: Path, tmp_path: Path
) -> None:
    """SST-2 described by a file gives what SST-2 gives; records name the file; another content is another run."""
    file = tmp_path / "films.yaml"
    file.write_text(SST2_FILE)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    wanted = job(small_model, data, tmp_path / "out", task=str(file), order="distil")
    pipeline.run(wanted)
    about = {"task": "films", "task_file": str(file), "task_sha256": digest}
    expected = [record | about for record in results(undisturbed)[:3]]
    assert results(tmp_path / "out") == expected
    saved = SavedRun.read(tmp_path / "out")
    assert saved.config["task_sha256"] == digest
    assert f"--task {file} " in saved.command
    assert "sha256" not in saved.command
    assert saved.scored_on == f"n = 32 validation examples of films (films.yaml, SHA-256 {digest[:12]}...)"
    file.write_text(SST2_FILE + "# changed\n")
    with pytest.raises(InputError, match=rf"holds a run with task_sha256 = '{digest}', not '[0-9a-f]+'; repeat its"):
        pipeline.run(wanted)
    assert RunConfig("a/b", task=str(file)).folder == Path("runs/b-films")
