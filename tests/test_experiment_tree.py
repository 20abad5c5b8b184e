"""The experiments on a tiny model: one tree of stages under all tables, each piece of it computed once."""

import csv
import importlib
import json
import subprocess
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from chai_jax.config import PlanConfig, TrainOverrides
from chai_jax.data.toy import toy_rows
from chai_jax.errors import InputError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's rows under the names of SST-2 and PIQA."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 64), ("validation", 24)):
        rows = toy_rows(split, count)
        choices = [{"goal": row["sentence"], "sol1": "no", "sol2": "very good", "label": row["label"]} for row in rows]
        for task, these in (("sst2", rows), ("piqa", choices)):
            (folder / task).mkdir(exist_ok=True)
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in these))
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all scripts, as a person has it."""
    return tmp_path_factory.mktemp("out")


def options(model: Path, data: Path, out: Path, kind: str = "lab.options.Options", **changes: Any) -> Any:
    module, name = kind.rsplit(".", 1)
    settings = {
        "task": "sst2",
        "seeds": "0",
        "finetune": "never",
        "planning": PlanConfig(layers=1.0, clusters="2", calibration=8, sensitivity="attention"),
        "train": TrainOverrides(lr=1e-2, batch=8, accumulation=1, max_steps=1),
    }
    return getattr(script(module), name)((str(model),), data_dir=data, out=out, **{**settings, **changes})


class Counting(dict[str, Any]):
    """The steps of a tree, counted as they are taken."""

    def __init__(self, steps: dict[str, Any]):
        super().__init__(steps)
        self.taken: Counter[str] = Counter()

    def __getitem__(self, name: str) -> Any:
        self.taken[name] += 1
        return super().__getitem__(name)

    def copy(self) -> "Counting":
        return self


def nudge(branch: Any, model: Any, keeping: Any) -> Any:
    """Instead of training, which takes long to compile: other embeddings, and a log of one update."""
    import jax

    keeping["log"]({"stage": "nudge", "step": 1, "loss": 1.0})
    return model.replace(params={**model.params, "embed": jax.tree.map(lambda x: 1.1 * x, model.params["embed"])})


def constant(models: dict[str, Any]) -> dict[str, Any]:
    """What `latency` returns, of models that are all equally fast."""
    times = {name: {"median": 2.0} for name in ("score_ms_per_example", "decode_ms_per_token")}
    shape = {"n": 1, "batch": 1, "prompt": 1, "new_tokens": 1, "device": "none", "dtype": "float32"}
    return {name: {**times, "ratio_to_first": times, **shape} for name in models}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Real steps, counted."""
    tree = script("lab.tree")
    counting = Counting(tree.STEPS)
    monkeypatch.setattr(tree, "STEPS", counting)
    return counting


@pytest.fixture
def steps(counted: Counting, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Real surgery, but neither training nor timing: what tables make of a tree does not depend on them."""
    counted.update(dict.fromkeys(("distil", "target", "target-medium-low"), nudge))
    monkeypatch.setattr(script("lab.tree"), "latency", constant)
    return counted


def written(out: Path, name: str) -> dict[str, Any]:
    """NAME.json, after checking that NAME.csv has the same rows and NAME.md a line for each."""
    whole = json.loads((out / f"{name}.json").read_text())
    with (out / f"{name}.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(whole["rows"]) > 0
    for line, row in zip(lines, whole["rows"], strict=True):
        flat = {key: value for key, value in row.items() if isinstance(value, str)}
        assert {key: line[key] for key in flat} == flat
        if "acc" in row:
            assert float(line["acc.mean"]) == row["acc"]["mean"] == pytest.approx(np.mean(row["acc_by_seed"]))
    table = (out / f"{name}.md").read_text().split("\n## ")[0]
    assert sum(line.startswith("| ") for line in table.splitlines()) == len(lines) + 2
    return whole


@pytest.mark.slow
def test_configurations_share_their_prefixes(small_model: Path, data: Path, out: Path, steps: Counting) -> None:
    wanted = options(small_model, data, out)
    module = script("configurations")
    summary = module.compare_all(wanted)
    # Eight configurations take 12 stages beside clustering; with shared prefixes 7 are left.
    assert steps.taken == {"cluster": 1, "distil": 1, "quantize": 2, "target": 4}
    rows = {row["bits"]: row for row in written(out, "configurations")["rows"]}
    assert list(rows) == ["-", *(f"{number:03b}" for number in range(8))]
    base = script("lab.tree").Tree(wanted, str(small_model), "sst2", 0).base
    assert rows["000"]["acc_by_seed"][0] == base.measured("cluster").acc
    assert rows["000"]["kv_bytes_per_token"]["mean"] == base.model("cluster").kv_bytes_per_token
    assert rows["111"]["stages"] == "cluster+distil+quantize+target"
    # Bytes follow from clustering and quantization alone; what is tuned is as large as before.
    for bits, row in rows.items():
        same = rows["000" if bits[0] == "0" else "100"] if bits != "-" else row
        assert row["kv_bytes_per_token"] == same["kv_bytes_per_token"]
    assert rows["100"]["kv_reduction"]["mean"] > rows["000"]["kv_reduction"]["mean"] > rows["-"]["kv_reduction"]["mean"]
    assert summary["rows"] == 9
    for picture in ("radar", "heatmap", "scatter3d", "losses"):
        assert (out / f"{picture}-model-sst2.png").stat().st_size > 1000

    before = (out / "configurations.json").read_bytes()
    steps.taken.clear()
    module.compare_all(wanted)
    assert not steps.taken
    assert (out / "configurations.json").read_bytes() == before


@pytest.mark.slow
def test_other_tables_read_the_same_tree(small_model: Path, data: Path, out: Path, steps: Counting) -> None:
    """After table 7, table 6 takes no step, table 3 the int8 cache, table 4 the other policy."""
    wanted = options(small_model, data, out)
    if not (out / "configurations.json").exists():
        script("configurations").compare_all(wanted)
    steps.taken.clear()
    script("methods").methods(wanted)
    assert not steps.taken
    script("quant").quant(wanted)
    assert steps.taken == {"int8": 1}
    steps.taken.clear()
    script("target").target(wanted)
    assert steps.taken == {"target-medium-low": 1}

    six = {row["row"]: row for row in written(out, "methods")["rows"]}
    seven = {row["stages"]: row for row in written(out, "configurations")["rows"]}
    for row in six.values():
        assert row["acc"] == seven[row["stages"]]["acc"]
    three = {row["row"]: row for row in written(out, "quant")["rows"]}
    # int8 of 8 values and a bfloat16 scale: 10 bytes for 16
    assert three["int8 cache alone"]["kv_reduction"]["mean"] == pytest.approx(1 - 10 / 16)
    assert three["CHAI-Quant"]["kv_reduction"] == seven["cluster+quantize"]["kv_reduction"]
    four = written(out, "target")["rows"]
    assert [row["against"] for row in four[2:]] == ["cluster", "cluster"]
    assert four[2]["kv_bytes_per_token"] == four[3]["kv_bytes_per_token"] == four[1]["kv_bytes_per_token"]


@pytest.mark.slow
def test_orders(small_model: Path, data: Path, out: Path, steps: Counting) -> None:
    wanted = options(small_model, data, out)
    script("orders").orders(wanted)
    rows = written(out, "orders")
    whole = [row for row in rows["rows"] if row["whole"]]
    assert len(rows["rows"]) == 16
    assert len(whole) == 6
    assert len({row["kv_bytes_per_token"]["mean"] for row in whole}) == 1
    assert len(rows["comparisons"]) == 5
    assert {one["comparisons"] for one in rows["comparisons"]} == {5}
    # 16 nodes, of which the configurations, whichever runs first, share eight
    script("configurations").compare_all(wanted)
    assert steps.taken.total() in (8, 16)
    steps.taken.clear()
    script("orders").orders(wanted)
    assert not steps.taken


@pytest.mark.slow
def test_real_stages_and_real_times(small_model: Path, data: Path, tmp_path: Path, counted: Counting) -> None:
    """The eight configurations with training and timing, one seed."""
    script("configurations").compare_all(options(small_model, data, tmp_path))
    assert counted.taken == {"cluster": 1, "distil": 1, "quantize": 2, "target": 4}
    rows = {row["bits"]: row for row in written(tmp_path, "configurations")["rows"]}
    assert {row["updates"] for bits, row in rows.items() if bits[1:] != "00" and bits not in "-101"} == {1}
    assert rows["-"]["latency"]["decode_ms_per_token_ratio"]["mean"] == 1
    assert all(row["latency"]["decode_ms_per_token"]["mean"] > 0 for row in rows.values())


@pytest.mark.slow
def test_layer_sweep(small_model: Path, data: Path, out: Path) -> None:
    script("layer_sweep").sweep(options(small_model, data, out))
    rows = written(out, "layer_sweep")["rows"]
    assert [row["fraction"] for row in rows] == [0.1, 0.3, 0.4, 0.5, 1.0]
    assert [row["clustered_layers"]["mean"] for row in rows] == [1, 1, 1, 1, 2]
    assert [row["head_reduction"]["mean"] for row in rows] == [0.25] * 4 + [0.5]
    assert len({row["original_acc"]["mean"] for row in rows}) == 1
    assert rows[-1]["kv_reduction"]["mean"] == 0.5
    assert (out / "layer_sweep-model.svg").exists()


@pytest.mark.slow
def test_sensitivity_by_task(small_model: Path, data: Path, out: Path) -> None:
    script("sensitivity").sensitivity(options(small_model, data, out, task="sst2,piqa", seeds="0,1"))
    whole = written(out, "sensitivity")
    assert len(whole["rows"]) == 3 * 3  # methods by pairs of tasks
    # 2 seeds of 2 halves: 6 pairs within a task, 16 between two
    assert {row["pairs"] for row in whole["rows"] if row["task"] == row["other"]} == {6}
    assert {row["pairs"] for row in whole["rows"] if row["task"] != row["other"]} == {16}
    assert len(whole["layers"]) == 3 * 2 * 2


def test_rank_correlations_of_known_scores() -> None:
    module = script("sensitivity")
    vectors = np.array([[1.0, 2, 3, 4], [10, 20, 30, 40], [4, 3, 2, 1], [8, 6, 4, 2], [5, 5, 5, 5]])
    rho = module.correlations(vectors)
    assert rho[:4, :4] == pytest.approx(np.array([[1, 1, -1, -1], [1, 1, -1, -1], [-1, -1, 1, 1], [-1, -1, 1, 1]]))
    assert not rho[4].any()
    tasks = [0, 0, 1, 1]
    assert module.apart(rho[:4, :4], tasks) == pytest.approx(2)
    # Of the six ways to name two and two, two are the real one.
    assert module.permutation_p(rho[:4, :4], tasks) == pytest.approx(1 / 3, abs=0.03)
    assert module.permutation_p(np.ones((4, 4)), tasks) == 1


def test_comparisons_of_known_answers() -> None:
    rows, result = script("lab.rows"), script("chai_jax.evaluation.result")

    def answers(right: list[int]) -> Any:
        labels = np.zeros(len(right), int)
        scores = np.stack([np.asarray(right, float), 1 - np.asarray(right, float)], axis=1)
        return result.Result("t", labels, scores, np.zeros_like(scores, bool))

    first = [answers([0, 0, 0, 0] * 8), answers([0, 0, 0, 0] * 8)]
    second = [answers([1, 1, 1, 0] * 8), answers([1, 0, 1, 0] * 8)]
    found = rows.compare(first, second)
    assert found["difference"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["sd_over_seeds"] == pytest.approx(0.25 / 2**0.5)
    each = np.tile([1, 0.5, 1, 0], 8)
    error = each.std(ddof=1) / len(each) ** 0.5
    assert found["difference_interval"] == pytest.approx(
        [each.mean() - 1.959964 * error, each.mean() + 1.959964 * error]
    )
    assert found["significant"]
    wider = rows.compare(first, second, comparisons=5)
    assert wider["difference_interval"][0] == pytest.approx(each.mean() - 2.575829 * error)
    assert not rows.compare(first, first)["significant"]


def test_floors_of_a_v3_8() -> None:
    """Of one question the weights bound, of many the arithmetic: with the published peaks of the chip."""
    module = script("throughput")
    config = module.architecture_of("facebook/opt-125m")
    spec = module.spec_of(config)
    # 125,239,296 parameters (Zhang et al. 2022), in bfloat16, at 900 GB/s
    one, many = (module.counted(config, spec, batch) for batch in (1, 4096))
    assert (one["bound"], many["bound"]) == ("memory", "compute")
    assert one["ms"] == pytest.approx(1e3 * 2 * 125_239_296 / 900e9)
    assert many["ms"] == pytest.approx(1e3 * many["flops"] / (4 * 123e12))
    layers = 12 * (12 * 768**2 * 2 * 32 + 4 * 768 * 32**2)
    assert many["flops"] == 4096 * (layers + 2 * 768 * 50272)


@pytest.mark.slow
def test_throughput(small_model: Path, data: Path, out: Path) -> None:
    module = script("throughput")
    kind = "throughput.ThroughputOptions"
    module.throughput(options(small_model, data, out, kind, batches="1,2", slice_batches="8"))
    rows = written(out, "throughput")["rows"]
    assert sum(row["how"] == "measured" for row in rows) == 4
    assert {row["model"] for row in rows if row["how"] == "floor, counted"} == {"opt-125m", "opt-350m", "opt-1.3b"}
    spread = [row for row in rows if row["how"] == "measured"]
    assert all(row["p10"] <= row["inferences_per_second"] <= row["p90"] for row in spread)


@pytest.mark.slow
def test_a_bigger_teacher(small_model: Path, data: Path, tmp_path: Path, out: Path) -> None:
    from chai_jax.files.store import load, save

    save(load(small_model), tmp_path / "large")
    module, kind = script("bigger_teacher"), "bigger_teacher.TeacherOptions"
    module.bigger_teacher(options(small_model, data, out, kind, teacher=str(tmp_path / "large")))
    rows = written(out, "bigger_teacher")["rows"]
    assert [row["model"] for row in rows] == ["large"] + ["model"] * 5
    # The teacher is the student's dense self under another name, so that both distillations are one and the same.
    assert rows[4]["acc_by_seed"] == rows[5]["acc_by_seed"]
    with pytest.raises(InputError, match="expected two models"):
        module.bigger_teacher(options(small_model, data, out, kind, teacher=str(small_model)))


def test_one_folder_holds_one_choice_of_settings(small_model: Path, data: Path, tmp_path: Path) -> None:
    tree = script("lab.tree")
    tree.Tree(options(small_model, data, tmp_path), str(small_model), "sst2", 0)
    tree.Tree(options(small_model, data, tmp_path, seeds="5"), str(small_model), "sst2", 5)
    with pytest.raises(InputError, match="holds experiments with limit = None, not 3"):
        tree.Tree(options(small_model, data, tmp_path, limit=3), str(small_model), "sst2", 0)
    for seeds in ("", "0,x", "-1"):
        with pytest.raises(InputError, match="--seeds"):
            _ = options(small_model, data, tmp_path, seeds=seeds).seed_numbers


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lab = script("lab.options")
    monkeypatch.setattr("sys.argv", ["quant.py"])
    with pytest.raises(SystemExit) as ended:
        lab.start(lambda options: {}, lab.Options, "About.")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: no MODEL is given")


def test_documents(tmp_path: Path) -> None:
    texts = script("lab.texts")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("one\ntwo")
    assert texts.documents(tmp_path / "a.jsonl") == ["one", "two"]
    assert texts.documents(tmp_path / "b.txt") == ["one\ntwo"]
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(InputError, match=r"c\.jsonl:2"):
        texts.documents(tmp_path / "c.jsonl")


@pytest.mark.slow
def test_training_a_test_model(data: Path, tmp_path: Path) -> None:
    """What comes out is a Hugging Face folder, and a second model can take its tokenizer."""
    from chai_jax.files.store import load

    module, text = script("train_test_model"), tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": row["sentence"]}) + "\n" for row in toy_rows("train", 40)))
    shape = {"layers": 1, "heads": 2, "width": 8, "positions": 64, "window": 16, "vocabulary": 300}
    first = module.Training((text,), tmp_path / "first", data_dir=data, **shape, steps=2, batch=4)
    record = module.train(first)
    model = load(tmp_path / "first")
    assert (model.config.vocab_size, model.config.num_layers, model.config.hidden_size) == (304, 1, 8)
    assert model.tokenizer("a b")["input_ids"][0] == 2 == model.config.bos_token_id
    assert [model.tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert record["scores"]["sst2"]["n"] == 24
    assert record["examples"] == 8
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not (tmp_path / "first.partial").exists()
    second = module.Training(
        (text,), tmp_path / "second", data_dir=data, tokenizer=tmp_path / "first", **{**shape, "width": 16}, steps=1
    )
    module.train(second)
    assert load(tmp_path / "second").tokenizer.get_vocab() == model.tokenizer.get_vocab()
    with pytest.raises(InputError, match="heads that divide"):
        module.train(module.Training((text,), tmp_path / "third", heads=3))


@pytest.mark.parametrize("small", [False, True])
def test_the_driver_asks_for_options_that_exist(small: bool, data: Path, tmp_path: Path) -> None:
    """Every command of all.sh is understood by its script, and every script of a table of the paper is there."""
    import shlex

    from chai_jax.commands.options import read

    kinds = {
        "throughput": "throughput.ThroughputOptions",
        "bigger_teacher": "bigger_teacher.TeacherOptions",
        "train_test_model": "train_test_model.Training",
    }
    given = {} if small else {"MODEL": "m", "DATA": str(data), "TEXT": "a b"}
    done = subprocess.run(
        ["bash", EXPERIMENTS / "all.sh", *["--small"] * small],
        env={"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "OUT": str(tmp_path), **given},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = []
    lines = done.stdout.splitlines()
    if small:
        assert lines.pop(0).startswith("chai-jax export toy")
    for line in lines:
        program, path, *argv = shlex.split(line)
        name = Path(path).stem
        module, kind = kinds.get(name, "lab.options.Options").rsplit(".", 1)
        parsed = read(getattr(script(module), kind), argv)
        assert (program, parsed.data_dir) == ("python", None if small else data)
        seen.append(name)
    beyond_the_paper = {"study", "bench_gpu", "decode_formats", "few_bits", "method_cost", "passkey", "rivals"}
    beyond_the_paper |= {"few_bits_picture", "few_bits_tasks", "merge_moments", "predictions", "serve_peers"}
    beyond_the_paper |= {"beyond_bits", "few_bits_distil", "redundancy", "rounding", "sharing", "speculation"}
    beyond_the_paper |= {"lighter_student", "speed", "steady"}
    scripts = {path.stem for path in EXPERIMENTS.glob("*.py") if "lab.options" in path.read_text()} - beyond_the_paper
    assert set(seen) == scripts
    assert len(seen) == len(scripts) == 10
