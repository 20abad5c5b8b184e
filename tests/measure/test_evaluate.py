"""Accuracy and perplexity against arithmetic by hand and example by example, and against the harness's formulas."""

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.data.tasks import get_task
from chai_jax.data.text import windows
from chai_jax.data.toy import toy_rows, toy_tokenizer
from chai_jax.errors import InputError
from chai_jax.measure.evaluate import Result, TextResult, evaluate, evaluate_rows, evaluate_windows, perplexity
from chai_jax.model.model import Model
from chai_jax.model.opt import OPTConfig, init
from chai_jax.spec import Spec

TOKENIZER = toy_tokenizer()
CONFIG = OPTConfig(len(TOKENIZER), 16, 2, 2, 32, 64, 16)
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


def make(scores: list[list[float]], labels: list[int], characters: np.ndarray | None = None) -> Result:
    return Result("sst2", np.array(labels), np.array(scores), np.zeros(np.shape(scores), bool), characters)


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


def test_known_answers() -> None:
    right = math.log(0.8), math.log(0.2)
    found = make([[*right], [*right], [*right[::-1]], [*right]], [0, 0, 0, 1]).metrics()
    assert (found["n"], found["acc"], found["majority"]) == (4, 0.5, 0.75)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert found["acc_interval"] == pytest.approx([0.1500, 0.8500], abs=1e-4)  # Wilson 1927 for 2 of 4
    assert found["ece"] == pytest.approx(0.3)  # sure to 0.8, right in 0.5
    assert found["loss"] == pytest.approx(-(2 * math.log(0.8) + 2 * math.log(0.2)) / 4)
    assert found["at_chance"] is True
    assert "acc_norm" not in found


def test_standard_error_is_the_harness_one(result: Result) -> None:
    mean_stderr = pytest.importorskip("lm_eval.api.metrics").mean_stderr
    assert result.metrics()["acc_stderr"] == pytest.approx(mean_stderr(result.right.astype(int).tolist()), rel=1e-12)


def test_acc_norm_divides_by_characters_without_the_leading_space(model: Model) -> None:
    rows = [{"goal": "the plot", "sol1": "is very good .", "sol2": "dull", "label": label} for label in (0, 1)]
    found = evaluate_rows(model, PIQA, rows)
    assert found.characters is not None
    assert found.characters.tolist() == [[14, 4], [14, 4]]
    by_character = (found.loglikelihoods / [14, 4]).argmax(1) == [0, 1]
    assert found.metrics()["acc_norm"] == by_character.mean()
    opposed = make([[-10.0, -4.0]] * 2, [0, 0], np.array([[10, 2]] * 2)).metrics()
    assert (opposed["acc"], opposed["acc_norm"]) == (0, 1)


def test_baseline_is_compared_question_by_question() -> None:
    before = make([[0.0, -1], [0, -1], [-1, 0], [-1, 0]], [0, 0, 0, 0])  # right, right, wrong, wrong
    after = make([[0.0, -1], [-1, 0], [-1, 0], [0, -1]], [0, 0, 0, 0])  # right, wrong, wrong, right
    found = after.against(before).metrics()
    error = math.sqrt(2 / 3) / 2
    assert found["difference"] == 0
    assert found["difference_stderr"] == pytest.approx(error)
    assert found["difference_interval"] == pytest.approx([-1.959964 * error, 1.959964 * error], rel=1e-6)
    assert found["flips"] == {"right_to_wrong": 1, "wrong_to_right": 1}


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


def test_metrics_are_json(result: Result) -> None:
    compared = result.against(result).metrics()
    assert json.loads(json.dumps(compared, allow_nan=False)) == compared


@pytest.mark.parametrize("characters", [None, np.array([[3, 4], [5, 6], [7, 8]])])
def test_samples_give_the_result_back(characters: np.ndarray | None, tmp_path: Path) -> None:
    result = make([[-1 / 3, -2.0], [-1, 0], [-4, -5]], [0, 1, 1], characters)
    result.write_samples(tmp_path / "samples.jsonl")
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == result.samples()
    assert [(one["index"], one["prediction"], one["right"]) for one in samples] == [
        (0, 0, True),
        (1, 1, True),
        (2, 0, False),
    ]
    assert Result.from_samples(samples).samples() == samples
    assert Result.from_samples(samples).metrics() == result.metrics()
    text = TextResult(np.array([3.5, 4.0]), np.array([2, 3]))
    assert TextResult.from_samples(json.loads(json.dumps(text.samples()))).metrics() == text.metrics()


@pytest.mark.parametrize(("samples", "complaint"), [([], "no samples"), ([{"task": "sst2"}], "usable 'label'")])
def test_refuses_what_are_no_samples(samples: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Result.from_samples(samples)


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


def test_text_errors_take_windows_as_independent() -> None:
    equal = TextResult(np.array([30.0, 50.0, 40.0]), np.array([10, 10, 10])).metrics()
    assert equal["loss_stderr"] == pytest.approx(1 / math.sqrt(3))
    assert equal["perplexity_stderr"] == pytest.approx(math.exp(4) / math.sqrt(3))
    short = TextResult(np.array([40.0, 40.0, 4.0]), np.array([10, 10, 1])).metrics()
    assert short["loss"] == pytest.approx(4)
    assert short["loss_stderr"] == pytest.approx(0)


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
