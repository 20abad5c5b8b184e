"""`chai-jax bench`: rows that agree with each other, files that parse, and one line for bad input."""

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from chai_jax.bench import sweep
from chai_jax.bench.floor import Rates
from chai_jax.bench.race import MEASURES, Shape, long_run
from chai_jax.bench.sweep import shapes, throughput, variants
from chai_jax.cli import main
from chai_jax.commands.bench import COLUMNS, numbers, short_names
from chai_jax.console import print_table
from chai_jax.errors import InputError
from chai_jax.files.published import random_model
from chai_jax.model.cache import cache_bytes
from chai_jax.report.tables import terminal

Record = dict[str, Any]
SMALL = ["--batch", "1,2", "--prompt", "8", "--new-tokens", "4", "--question", "10", "--trials", "2", "--tokens", "20"]


@pytest.fixture(scope="module")
def done(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    """The record that the command wrote, of random weights beside a compressed variant, and its folder."""
    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.MonkeyPatch.context() as patch:
        found = iter([0.5, 1.0, 2.0, 1.0])  # one in each of two rounds of two shapes
        patch.setattr(sweep, "probe_rates", lambda dtype, seconds: Rates(1e9 * next(found), 1e10, "float32"))
        status = main(
            ["bench", f"random:{small_model}", "--clusters", "0.5", "--storage", "int8", *SMALL, "--out", str(out)]
        )
    assert status == 0
    return json.loads((out / "bench.json").read_text(encoding="utf-8")), out


@pytest.mark.slow
def test_there_is_a_row_for_every_model_and_shape(done: tuple[Record, Path], small_model: Path) -> None:
    record, _ = done
    dense, small = f"random:{small_model}", f"random:{small_model} qkv 0.5 int8"
    assert [(row["model"], row["batch"]) for row in record["rows"]] == [(dense, 1), (small, 1), (dense, 2), (small, 2)]
    for row in record["rows"]:
        assert [row[name] for name in ("n", "prompt", "new_tokens", "question")] == [2, 8, 4, 10]
        assert (row["layers"], row["heads"], row["framework"]) == (2, 4, "chai_jax")
        assert (row["clusters"], row["clustered_layers"]) == ((4, 0) if row["model"] == dense else (2, 2))
    assert record["options"]["clusters"] == [0.5]
    assert record["threads"]["xla"] >= 1
    rates = [record[name]["bytes_per_second"] for name in ("probe", "probe_best")]
    assert (record["probes"], rates) == (4, [1e9, 2e9])


@pytest.mark.slow
def test_rates_floors_and_bytes_follow_from_the_rest(done: tuple[Record, Path], small_model: Path) -> None:
    record, _ = done
    model = random_model(str(small_model), 0)
    (variant,) = variants("x", model, [0.5], "qkv", "int8")
    for row in record["rows"]:
        step, scored = row["decode_ms_per_token"], row["score_ms_per_example"]
        assert row["tokens_per_second"]["median"] == pytest.approx(1e3 * row["batch"] / step["median"])
        assert row["inferences_per_second"]["median"] == pytest.approx(1e3 / scored["median"])
        assert row["tokens_per_second"]["p10"] <= row["tokens_per_second"]["median"] <= row["tokens_per_second"]["p90"]
        for name in MEASURES:
            floor = row["floor"][name]
            assert floor["ms"] == pytest.approx(max(floor["bytes"] / 1e6, floor["flops"] / 1e7))
            assert row["floor_fraction"][name] == pytest.approx(floor["ms"] / row[name]["median"])
        spec = variant.model.spec if row["clustered_layers"] else model.spec
        assert row["bytes"]["kv"] == row["bytes"]["kv_formula"] == cache_bytes(spec, row["batch"], 16)
        assert row["bytes"]["weights"] == (variant.model if row["clustered_layers"] else model).nbytes
        # Whole turns of batch x 4 tokens that reach 20.
        assert row["long_run"]["tokens"] == {1: 20, 2: 24}[row["batch"]]
        assert row["long_run"]["decode_ms_per_token"] > 0


def test_the_table_fits_a_laptop(capsys: pytest.CaptureFixture[str]) -> None:
    """One line a model and shape."""

    def times(median: float) -> Record:
        return {"median": median, "p10": 0.97 * median, "p90": 1.06 * median}

    row = {
        "batch": 1024,
        "prompt": 2048,
        "prefill_ms": times(12345.6),
        "decode_ms_per_token": times(61.53),
        "ratio_to_first": {"decode_ms_per_token": times(0.5)},
        "floor_fraction": {"decode_ms_per_token": 0.789},
        "tokens_per_second": times(16642.3),
        "inferences_per_second": times(20123.4),
    }
    names = ["random:facebook/opt-125m", "random:facebook/opt-125m qkv 0.25 int8"]
    print_table(terminal([{**row, "model": name} for name in names], "title", COLUMNS))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    for name in ("opt-125m", "opt-125m qkv 0.25 int8"):
        (line,) = [line for line in lines if line.startswith(f" {name}  ")]
        numbers = line.removeprefix(f" {name}").split("  ")
        assert [cell.strip() for cell in numbers if cell.strip()] == [
            *("1024", "2048", "12,346 [11,975, 13,086]", "61.5 [59.7, 65.2]", "0.50", "79", "16,642", "20,123.4")
        ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("toy", "toy"),
        ("random:facebook/opt-125m qkv 0.25 int8", "opt-125m qkv 0.25 int8"),
        ("hf random:facebook/opt-125m", "hf opt-125m"),
        ("runs/quarter/model qk 0.5", "quarter/model qk 0.5"),
        ("models/mine/", "mine/"),
        ("/a/model-b", "model-b"),
    ],
)
def test_models_are_shown_by_their_last_name(name: str, short: str) -> None:
    assert short_names(name) == short


@pytest.mark.slow
def test_every_file_is_there_and_holds_the_rows(done: tuple[Record, Path]) -> None:
    record, out = done
    assert {path.name for path in out.iterdir()} == {
        *("bench.json", "bench.csv", "bench.md"),
        *(f"{name}.{suffix}" for name in ("batch", "clusters") for suffix in ("png", "svg", "csv")),
    }
    with (out / "bench.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["prefill_ms.median"]) for row in rows] == [row["prefill_ms"]["median"] for row in record["rows"]]
    lines = (out / "bench.md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(rows)
    assert "n = 2 interleaved rounds" in lines[-1]
    with (out / "clusters.csv").open(encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    assert {(row["series"], row["cached key heads a layer (mean)"]) for row in points} == {
        (f"batch {batch}, prompt 8", clusters) for batch in (1, 2) for clusters in ("2.0", "4.0")
    }
    for name in ("batch", "clusters"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(out / f"{name}.svg")


def test_throughput_turns_percentiles_round() -> None:
    assert throughput(8, {"median": 4.0, "p10": 2.0, "p90": 8.0}) == {"median": 2000.0, "p10": 1000.0, "p90": 4000.0}


class Steady:
    """Decodes in times that are known."""

    compile_seconds, bytes = 0.0, {}

    def __init__(self, *milliseconds: float) -> None:
        self.times = iter(milliseconds)

    def score(self) -> tuple[float, None]:
        raise AssertionError("nothing is scored on a long run")

    def generate(self) -> tuple[float, float, None]:
        return 1e6, next(self.times), None


def test_a_long_run_is_the_mean_of_steps_with_its_error() -> None:
    shape = Shape(batch=2, new_tokens=5)
    found = long_run({"a": Steady(10, 20, 30), "b": Steady(5, 5, 5)}, shape, tokens=21)
    assert found["a"] == {"tokens": 30, "decode_ms_per_token": 4.0, "stderr": pytest.approx(2 / 3**0.5)}
    assert found["b"] == {"tokens": 30, "decode_ms_per_token": 1.0, "stderr": 0.0}
    assert long_run({"a": Steady(10)}, shape, tokens=1)["a"]["stderr"] is None


def test_default_prompts_are_cut_to_the_positions(small_model: Path) -> None:
    model = random_model(str(small_model), 0)  # 64 positions
    assert [shape.prompt for shape in shapes([model], [1], [], Shape(new_tokens=20))] == [32, 44]
    assert [(one.batch, one.prompt) for one in shapes([model], [1, 8], [5, 9], Shape())] == [
        (1, 5),
        (1, 9),
        (8, 5),
        (8, 9),
    ]


def test_numbers_are_read_once_each_in_order() -> None:
    assert numbers("batch", "8, 1,8", int) == [8, 1]
    assert numbers("clusters", "", float) == []
    for text in ("0", "x", "1.5", "nan"):
        with pytest.raises(InputError, match="--batch is"):
            numbers("batch", text, int)
    for text in ("0", "1.1", "inf", "a"):
        with pytest.raises(InputError, match="--clusters is"):
            numbers("clusters", text, float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "no MODEL"),
        ("random:facebook/opt-1b", "facebook/opt-1b is no folder with a config.json"),
        ("MODEL --batch 1,zero", "--batch is '1,zero'; expected whole numbers from 1"),
        ("MODEL --batch ,", "--batch is empty"),
        ("MODEL --clusters 2", "--clusters is '2'; expected fractions"),
        ("MODEL --trials 0", "--trials is 0; expected at least 1"),
        ("MODEL --threads 0", "--threads is 0; expected at least 1"),
        ("MODEL --prompt 60 --new-tokens 32", "does not fit 64 positions"),
        ("MODEL --new-tokens 64", "does not fit 64 positions"),
        ("MODEL --question 65", "does not fit 64 positions"),
        ("MODEL --out MODEL", "already holds something"),
    ],
)
def test_bad_input_gives_one_line(
    options: str, message: str, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options.replace("MODEL", str(small_model)).split()]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert captured.out == ""


def test_two_vocabularies_give_one_line(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = json.loads((small_model / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(fields | {"vocab_size": 2 * fields["vocab_size"]}))
    assert main(["bench", str(small_model), f"random:{tmp_path}"]) == 2
    assert "expected one or more models of one vocabulary" in " ".join(capsys.readouterr().err.split())


def test_a_missing_peer_gives_one_line(
    small_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", str(small_model), "--peer", "hf"]) == 2
    assert "--peer hf needs torch, which is not installed" in capsys.readouterr().err
