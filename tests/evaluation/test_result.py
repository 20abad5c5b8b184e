"""Figures derived from answers and losses, against arithmetic by hand and the harness's formula."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.evaluation.result import Result, TextResult
from chai_jax.files.atomic import finite


def make(scores: list[list[float]], labels: list[int], characters: np.ndarray | None = None) -> Result:
    return Result("sst2", np.array(labels), np.array(scores), np.zeros(np.shape(scores), bool), characters)


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


def test_characters_decide_acc_norm() -> None:
    opposed = make([[-10.0, -4.0]] * 2, [0, 0], np.array([[10, 2]] * 2)).metrics()
    assert (opposed["acc"], opposed["acc_norm"], opposed["acc_norm_stderr"]) == (0, 1, 0)


@pytest.mark.filterwarnings("ignore")
def test_standard_error_is_the_harness_one() -> None:
    mean_stderr = pytest.importorskip("lm_eval.api.metrics").mean_stderr
    result = make([[-1.0, -2], [-2, -1], [-1, -3]], [0, 0, 0])
    assert result.metrics()["acc_stderr"] == pytest.approx(mean_stderr(result.right.astype(int).tolist()), rel=1e-12)


def test_baseline_is_compared_question_by_question() -> None:
    before = make([[0.0, -1], [0, -1], [-1, 0], [-1, 0]], [0, 0, 0, 0])  # right, right, wrong, wrong
    after = make([[0.0, -1], [-1, 0], [-1, 0], [0, -1]], [0, 0, 0, 0])  # right, wrong, wrong, right
    found = after.against(before).metrics()
    error = math.sqrt(2 / 3) / 2
    assert found["difference"] == 0
    assert found["difference_stderr"] == pytest.approx(error)
    assert found["difference_interval"] == pytest.approx([-1.959964 * error, 1.959964 * error], rel=1e-6)
    assert found["flips"] == {"right_to_wrong": 1, "wrong_to_right": 1}


def test_metrics_are_json() -> None:
    result = make([[-1.0, -2], [-2, -1], [-1, -3]], [0, 0, 1], np.array([[3, 4], [5, 6], [7, 8]]))
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


def test_text_errors_take_windows_as_independent() -> None:
    equal = TextResult(np.array([30.0, 50.0, 40.0]), np.array([10, 10, 10])).metrics()
    assert equal["loss_stderr"] == pytest.approx(1 / math.sqrt(3))
    assert equal["perplexity_stderr"] == pytest.approx(math.exp(4) / math.sqrt(3))
    short = TextResult(np.array([40.0, 40.0, 4.0]), np.array([10, 10, 1])).metrics()
    assert short["loss"] == pytest.approx(4)
    assert short["loss_stderr"] == pytest.approx(0)


@pytest.mark.parametrize("loss", [708.9, 709.0, 800.0, 1e6])
def test_a_perplexity_beyond_floats_is_infinite(loss: float, torch: ModuleType) -> None:
    found = TextResult(np.array([10 * loss, 10 * loss + 1]), np.array([10, 10])).metrics()
    expected = torch.tensor(loss + 0.05, dtype=torch.float64).exp().item()
    assert found["perplexity"] == pytest.approx(expected, rel=1e-9)
    assert found["perplexity_stderr"] == pytest.approx(expected * found["loss_stderr"], rel=1e-9)
    written = json.loads(json.dumps(finite(found), allow_nan=False))
    assert written == {name: value if math.isfinite(value) else None for name, value in found.items()}
    assert written["loss"] == pytest.approx(loss + 0.05)
