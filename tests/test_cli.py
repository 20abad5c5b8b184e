"""The command line: every bad input gives one clear line, exit status 2, and leaves nothing behind."""

import errno
import json
import os
import pickle
import shutil
import signal
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chai_jax.cli import main
from chai_jax.data.toy import POSITIONS
from chai_jax.run import pipeline

ROWS = [{"sentence": f"the plot is {word} ", "label": at % 2} for at, word in enumerate(["dull", "great"] * 8)]


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    """A copy of `small_model` to damage."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a few SST-2-like rows."""
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder.parent


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line that a command printed when it refused its input."""
    status = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def no_model(model: Path) -> None:
    (model / "config.json").unlink()


def of_no_family(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "bloom"}))


def missing_shard(model: Path) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def tampered(model: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[:8] = (2**40).to_bytes(8, "little")
    path.write_bytes(content)


def nan_weights(model: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in tensors if name.endswith("fc1.weight"))
        tensors[name][0, 0] = np.nan

    rewrite(model / "model.safetensors", spoil)


def evil_pickle(model: Path) -> None:
    """A .bin that would leave a mark if it were run."""

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
            return os.system, (f"touch {model / 'executed'}",)

    (model / "model.safetensors").unlink()
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model.decoder.embed_tokens.weight": Evil()}))


BAD_MODELS = {
    no_model: "no config.json",
    of_no_family: "'bloom'; expected one of opt",
    missing_shard: "model-00001-of-00002.safetensors",
    truncated: "model.safetensors",
    tampered: "model.safetensors",
    nan_weights: "fc1.weight",
    evil_pickle: "system",
}


@pytest.mark.parametrize("damage", BAD_MODELS, ids=lambda damage: damage.__name__)
def test_bad_models(
    damage: Callable[[Path], None], model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damage(model)
    out = tmp_path / "out"
    assert BAD_MODELS[damage] in refused(capsys, "export", model, "--out", out)
    assert not out.exists()
    assert not (model / "executed").exists()


def rows(data: Path, split: str, content: str) -> None:
    (data / "sst2" / f"{split}.jsonl").write_text(content)


BAD_ROWS = {
    "missing column": ('{"text": "x", "label": 0}\n', "no column 'sentence'"),
    "label out of range": ('{"sentence": "x", "label": 2}\n', "label 2"),
    "label is no number": ('{"sentence": "x", "label": "positive"}\n', "label 'positive'"),
    "empty": ("", "no examples"),
    "not json": ('{"sentence": \n', "validation.jsonl:1 is not JSON"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_data(kind: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = BAD_ROWS[kind]
    rows(data, "validation", content)
    assert message in refused(capsys, "evaluate", model, "--task", "sst2", "--data-dir", data)


def test_missing_data_and_unknown_task(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "rte" in refused(capsys, "evaluate", model, "--task", "rte", "--data-dir", data)
    assert "task 'mnli' is unknown" in refused(capsys, "evaluate", model, "--task", "mnli", "--data-dir", data)


def test_bad_run_arguments(model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = ("run", model, "--task", "sst2", "--data-dir", data, "--finetune", "never", "--out", out)
    assert "unknown stage 'prune'" in refused(capsys, *job, "--order", "distil,prune")
    assert not out.exists()
    assert "either --task" in refused(capsys, "run", model, "--out", out)
    assert "a number from 1 to 4 (the heads)" in refused(capsys, *job, "--clusters", "5")
    assert "expected elbow" in refused(capsys, *job, "--clusters", "many")
    prompt = (*job, "--membership", "prompt")
    assert "use share 'qk'" in refused(capsys, *prompt, "--share", "qkv")
    assert "--warmup-tokens is 0" in refused(capsys, *prompt, "--warmup-tokens", "0")
    assert "leave one of them out" in refused(capsys, *prompt, "--kv-budget", "0.5")
    assert "add --kv-budget 1" in refused(capsys, *job, "--model-budget", "0.5")
    assert "only the planner reads it" in refused(capsys, *job, "--pin", "0")
    assert "--share none is given without --kv-budget" in refused(capsys, *job, "--share", "none")
    assert "--rank is 1.5" in refused(capsys, *job, "--rank", "1.5")
    budget = (*job, "--kv-budget")
    assert "--kv-budget is -0.5" in refused(capsys, *budget, "-0.5")
    assert "--kv-budget is 25.0; expected a fraction of" in refused(capsys, *budget, "25")
    assert "--storages is 'int5'" in refused(capsys, *budget, "0.5", "--storages", "int5")
    assert "layer 7 is pinned; expected layers from 0 to 1" in refused(capsys, *budget, "0.5", "--pin", "0,7")
    assert "expected layer numbers" in refused(capsys, *budget, "0.5", "--pin", "first")
    assert "teacher-of-none" in refused(capsys, *job, "--teacher", tmp_path / "teacher-of-none")
    assert not out.exists()


def test_more_clusters_than_heads(model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert "from 1 to 4 (the heads)" in refused(
        capsys, "plan", model, "--task", "sst2", "--data-dir", data, "--clusters", "5", "--out", plan
    )
    assert not plan.exists()


def test_formats_alone(model: Path, data: Path, tmp_path: Path) -> None:
    """With a budget the planner may be told to merge nothing."""
    out = tmp_path / "plan.json"
    job = ["plan", str(model), "--task", "sst2", "--data-dir", str(data), "--calibration", "2", "--out", str(out)]
    assert main([*job, "--kv-budget", "0.6", "--share", "none"]) == 0
    layers = json.loads(out.read_text())["layers"]
    assert all(len(one["heads"]) == 1 for layer in layers for one in layer["clusters"])
    assert {one["storage"] for layer in layers for one in layer["clusters"]} == {"int8"}


def plan_json(**changes: object) -> str:
    clusters = [{"heads": [0, 1], "keep": 0, "storage": "int8"}, {"heads": [2, 3], "keep": 2, "storage": "bfloat16"}]
    layers = [{"clusters": clusters, "tier": "medium"}] * 2
    return json.dumps({"layers": layers, "share": "qkv", **changes})


BAD_PLANS = {
    "prompt membership with merged values": (plan_json(membership="prompt"), "prompt membership with share 'qkv'"),
    "prompt membership with two storages": (plan_json(membership="prompt", share="qk"), "two storages"),
    "a cluster with two storages": (
        plan_json().replace('"storage": "int8"', '"storage": ["int8", "bfloat16"]'),
        "clusters[0].storage is ['int8', 'bfloat16']",
    ),
    "tuning the most sensitive layers without scores": (plan_json(), "sensitiv"),
    "a rank above the width": (
        plan_json().replace('"tier"', '"share": "kv", "key_rank": 1000000, "tier"'),
        "rank 1000000; expected at most the model's width, 32",
    ),
    "another model's": (json.dumps({"layers": json.loads(plan_json())["layers"][:1]}), "the model has 2 layers"),
}


@pytest.mark.parametrize("kind", BAD_PLANS)
def test_plans_that_cannot_be(
    kind: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    content, message = BAD_PLANS[kind]
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    plan.write_text(content)
    line = refused(capsys, "run", model, "--task", "sst2", "--data-dir", data, "--plan", plan, "--out", out)
    assert message in line
    assert not out.exists()


def test_prompt_longer_than_the_position_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{POSITIONS} positions" in refused(capsys, "generate", model, "--prompt", "dull " * POSITIONS)


def test_output_folders_found_out_first(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("mine")
    job = ("run", model, "--task", "sst2", "--data-dir", data)
    assert "something that is not a run" in refused(capsys, *job, "--out", taken)
    assert "already holds something" in refused(capsys, "export", model, "--out", taken)
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in refused(capsys, *job, "--out", file)
    assert "cannot write" in refused(capsys, *job, "--out", file / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output_folder(model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "cannot write" in refused(
        capsys, "run", model, "--task", "sst2", "--data-dir", data, "--out", locked / "out"
    )


def test_last_line_is_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(model), str(model)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["max_logit_difference"] == 0
    assert found["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert main(["env"]) == 0
    assert "jax" in json.loads(capsys.readouterr().out.splitlines()[-1])["versions"]


def test_export_of_a_model_is_the_model(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["export", str(model), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["verify", str(model), str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_logit_difference"] <= 1e-5


def test_a_run_that_is_terminated_exits_with_a_status_of_its_own(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of training, where SIGTERM need not wait for an update to end."""

    def terminated(config: object, execution: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pipeline, "run", terminated)
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["run", str(model), "--task", "sst2", "--data-dir", str(data), "--out", str(tmp_path / "out")]
    assert main(arguments) == 75
    assert signal.getsignal(signal.SIGTERM) is before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the same command goes on from there" in captured.err


def test_a_full_disk_is_one_line(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(config: object, execution: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(pipeline, "run", full)
    line = refused(capsys, "run", model, "--task", "sst2", "--data-dir", data, "--out", tmp_path / "out")
    assert "No space left on device: 'metrics.jsonl'; make room and repeat the command" in line
