"""Accuracy and perplexity against arithmetic done example by example and token by token."""

import dataclasses
import gzip
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.cli import main
from chai_jax.data.tasks import get_task
from chai_jax.data.text import windows
from chai_jax.data.toy import toy_rows, toy_tokenizer
from chai_jax.errors import InputError
from chai_jax.evaluation.tasks import Result, evaluate, evaluate_rows, evaluate_windows, perplexity
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

TOKENIZER = toy_tokenizer()
CONFIG = Architecture(len(TOKENIZER), 16, 2, 2, 32, 64, 16)
SPEC = Spec.dense(2, 2, 8)
SST2, PIQA = get_task("sst2"), get_task("piqa")


def random_model(seed: int) -> Model:
    return Model(CONFIG, SPEC, init(CONFIG, SPEC, jax.random.key(seed), std=0.4), TOKENIZER, "random")


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(0)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return toy_rows("validation", 20)


@pytest.fixture(scope="module")
def result(model: Model, rows: list[dict[str, Any]]) -> Result:
    return evaluate_rows(model, SST2, rows)


@pytest.fixture(scope="module")
def text() -> str:
    return " ".join(row["sentence"] for row in toy_rows("train", 30))


def naive_logprobs(model: Model, tokens: list[int], start: int) -> float:
    """Sum of log p(token | all before it) from `start` on, in float64."""
    logits = np.asarray(model(np.array([tokens[:-1]])), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(sum(logprobs[at - 1, tokens[at]] for at in range(start, len(tokens))))


def test_scores_each_choice_after_its_prompt(model: Model, rows: list[dict[str, Any]], result: Result) -> None:
    for index, row in enumerate(rows[:3]):
        prompt = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
        for choice, answer in enumerate((" negative", " positive")):
            tokens = TOKENIZER(prompt + answer)["input_ids"]
            expected = naive_logprobs(model, tokens, len(TOKENIZER(prompt)["input_ids"]))
            assert result.loglikelihoods[index, choice] == pytest.approx(expected, abs=1e-4)
    assert result.labels.tolist() == [row["label"] for row in rows]
    assert result.n == 20


def test_acc_norm_divides_by_characters_without_the_leading_space(model: Model) -> None:
    rows = [{"goal": "the plot", "sol1": "is very good .", "sol2": "dull", "label": label} for label in (0, 1)]
    found = evaluate_rows(model, PIQA, rows)
    assert found.lengths is not None
    assert found.lengths.tolist() == [[14, 4], [14, 4]]
    by_character = (found.loglikelihoods / [14, 4]).argmax(1) == [0, 1]
    assert found.metrics()["acc_norm"] == by_character.mean()


def test_baseline_may_be_a_model_and_must_have_answered_the_same(
    model: Model, rows: list[dict[str, Any]], result: Result, tmp_path: Path
) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = random_model(1)
    found = evaluate(other, "sst2", data_dir=tmp_path, baseline=model)
    assert found.baseline is not None
    np.testing.assert_array_equal(found.baseline.loglikelihoods, result.loglikelihoods)
    expected = evaluate_rows(other, SST2, rows).acc - result.acc
    assert found.metrics()["difference"] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InputError, match="answered 20 questions of sst2, not these 10 of sst2"):
        evaluate(other, "sst2", data_dir=tmp_path, limit=10, baseline=result)


def test_refuses_one_example_and_no_tokenizer(model: Model, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="expected at least 2"):
        evaluate_rows(model, SST2, rows[:1])
    with pytest.raises(InputError, match="no tokenizer"):
        evaluate_rows(model.replace(tokenizer=None), SST2, rows)


def test_perplexity_reads_every_token_once_after_a_sentence_start(model: Model, text: str, tmp_path: Path) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"]
    parts = [[2, *ids[at : at + 31]] for at in range(0, len(ids), 31)]
    assert 1 < len(parts[-1]) < 32
    nats = -sum(naive_logprobs(model, part, 1) for part in parts)
    found = perplexity(model, text, window=32)
    assert (found["n"], found["windows"]) == (len(ids), len(parts))
    assert found["loss"] == pytest.approx(nats / len(ids), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert perplexity(model, text)["windows"] == math.ceil(len(ids) / 63)
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert perplexity(model, path, window=32) == found


def test_text_baseline_is_compared_window_by_window(model: Model, text: str) -> None:
    encoded = windows(TOKENIZER, text, 32)
    first, second = (evaluate_windows(one, encoded) for one in (model, random_model(1)))
    found = second.against(first).metrics()
    assert found["difference"] == pytest.approx(second.loss - first.loss, abs=1e-9)
    low, high = found["difference_interval"]
    assert low < found["difference"] < high
    assert "bits_per_byte" not in found
    with pytest.raises(InputError, match="other windows"):
        second.against(dataclasses.replace(first, tokens=first.tokens[:-1], losses=first.losses[:-1]))


@pytest.mark.parametrize("window", [1, 65])
def test_perplexity_refuses_what_it_cannot_measure(model: Model, text: str, window: int) -> None:
    with pytest.raises(InputError, match=f"window is {window}; expected 2 to the model's 64"):
        perplexity(model, text, window)
    with pytest.raises(InputError, match="expected at least 2"):
        perplexity(model, "the plot is dull .")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A task file whose questions have two to four answers; lengths in characters, bytes and tokens differ."""
    questions = [
        {"film": "the plot", "ends": ["is very good .", "dull"], "right": 0},
        {
            "film": "critics say the cast",
            "ends": ["is dull .", "is élan .", "good", "is never very dull ."],
            "right": 3,
        },
        {"film": "the film", "ends": ["bad", "is great .", "電影"], "right": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    text = "context: '{{film}}'\nchoices: ends\ngold: right\nvalidation: rows.jsonl\n"
    (tmp_path / "films.yaml").write_text(text)
    return tmp_path / "films.yaml"


UNITS: dict[str, tuple[str, Callable[[str], int]]] = {
    "characters": ("acc_norm", len),
    "bytes": ("acc_bytes", lambda answer: len(answer.encode())),
    "tokens": ("acc_tokens", lambda answer: len(TOKENIZER(answer, add_special_tokens=False)["input_ids"])),
}


@pytest.mark.parametrize("unit", ["none", *UNITS])
def test_questions_of_a_file_with_as_many_choices_as_each_has(unit: str, own: Path, model: Model) -> None:
    own.write_text(f"{own.read_text()}normalise: {unit}\n")
    rows = [json.loads(line) for line in (own.parent / "rows.jsonl").read_text().splitlines()]
    found = evaluate(model, str(own))
    assert found.loglikelihoods.shape == (3, 4)
    expected = []
    for row in rows:
        prompt = TOKENIZER(row["film"])["input_ids"]
        answers = [TOKENIZER(f"{row['film']} {answer}")["input_ids"] for answer in row["ends"]]
        expected.append([naive_logprobs(model, answer, len(prompt)) for answer in answers])
    samples = found.samples()
    for sample, totals in zip(samples, expected, strict=True):
        assert sample["loglikelihoods"] == pytest.approx(totals, abs=1e-4)
        assert len(sample["greedy"]) == len(totals)
    right = [int(np.argmax(totals)) == row["right"] for totals, row in zip(expected, rows, strict=True)]
    assert found.metrics()["acc"] == pytest.approx(np.mean(right))
    assert ({"acc_norm", "acc_bytes", "acc_tokens"} & found.metrics().keys()) == (
        set() if unit == "none" else {UNITS[unit][0]}
    )
    if unit != "none":
        name, length = UNITS[unit]
        each = [[length(answer) for answer in row["ends"]] for row in rows]
        assert [sample[unit] for sample in samples] == each
        best = [int(np.argmax(np.divide(totals, sizes))) for totals, sizes in zip(expected, each, strict=True)]
        assert found.metrics()[name] == pytest.approx(np.mean(np.array(best) == [row["right"] for row in rows]))
    again = Result.from_samples(json.loads(json.dumps(samples, allow_nan=False)))
    assert again.samples() == samples
    assert again.metrics() == found.metrics()
    assert found.confidence == pytest.approx([np.exp(max(t)) / np.exp(t).sum() for t in expected], abs=1e-4)


def test_the_commands_say_which_file(own: Path, small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"task_file": str(own), "task_sha256": hashlib.sha256(own.read_bytes()).hexdigest()}
    assert main(["evaluate", str(small_model), "--task", f"{own},toy", "--limit", "3", "-o", str(own.parent)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {"films", "toy"}
    assert found["films"].items() >= about.items()
    assert found["films"]["n"] == 3
    assert "task_file" not in found["toy"]
    assert len((own.parent / "samples_films.jsonl").read_text().splitlines()) == 3
    own.write_text(f"{own.read_text()}train: rows.jsonl\n")
    about["task_sha256"] = hashlib.sha256(own.read_bytes()).hexdigest()
    plan = ["--layers", "1", "--clusters", "2", "--calibration", "2", "-o", str(own.parent / "plan.json")]
    assert main(["plan", str(small_model), "--task", str(own), *plan]) == 2
    assert "films has 3 training and 3 validation rows; expected more of both" in capsys.readouterr().err
    with (own.parent / "rows.jsonl").open("a") as file:
        file.writelines(json.dumps({"film": f"film {n}", "ends": ["good", "bad"], "right": 0}) + "\n" for n in range(9))
    assert main(["plan", str(small_model), "--task", str(own), *plan]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).items() >= about.items()


def test_a_text_is_compared_window_by_window(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the plot is dull . the cast is good . " * 9)
    job = ["evaluate", str(small_model), "--text", str(text), "--window", "8"]
    assert main([*job, "--limit", "3", "--baseline", str(small_model), "-o", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])[str(text)]
    assert (found["windows"], found["n"]) == (3, 3 * 7)
    assert (found["difference"], found["difference_interval"]) == (0.0, [0.0, 0.0])
    assert "bits_per_byte" not in found  # of a part of the text
    samples = [json.loads(line) for line in (tmp_path / "samples_text.jsonl").read_text().splitlines()]
    assert sum(sample["loss"] for sample in samples) == pytest.approx(found["loss"] * found["n"])
    assert main([*job, "--limit", "1"]) == 2
    assert "limit is 1; expected at least 2 windows" in capsys.readouterr().err


def test_a_bad_file_is_refused_before_the_model_is_read(
    own: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("evaluate", "run", "plan"):
        job = [command, str(own.parent / "no model"), "--task", str(own.with_name("no.yaml"))]
        assert main([*job, "-o", str(own.parent / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: cannot read ")
        assert "no.yaml (No such file or directory); expected a task file" in line
    own.write_text(own.read_text().replace("ends", "endings"))
    assert main(["evaluate", str(small_model), "--task", str(own)]) == 2
    assert "rows.jsonl:1 has no column 'endings'; expected film, endings and right" in capsys.readouterr().err
