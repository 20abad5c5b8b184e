"""Each figure against scipy, the lm-evaluation-harness, or a loop that spells its definition out."""

import numpy as np
import pytest
from scipy import stats

from chai_jax.evaluation.statistics import (
    Z95,
    at_chance,
    calibration_error,
    calibration_interval,
    flips,
    majority,
    paired,
    standard_error,
    wilson,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_z_is_the_normal_quantile() -> None:
    assert pytest.approx(stats.norm.ppf(0.975), abs=1e-12) == Z95


def test_standard_error_is_scipy_s_and_the_harness_s(rng: np.random.Generator) -> None:
    scores = rng.normal(size=37)
    assert standard_error(scores) == pytest.approx(stats.sem(scores), abs=1e-12)
    right = (rng.random(872) < 0.8).astype(float)
    metrics = pytest.importorskip("lm_eval.api.metrics")
    assert standard_error(right) == pytest.approx(metrics.mean_stderr(right.tolist()), abs=1e-12)


def test_standard_error_of_one_value_is_unknown() -> None:
    assert np.isnan(standard_error(np.ones(1)))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_the_published_interval(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 1), (0, 1), (436, 872), (700, 872), (3, 277)])
def test_wilson_ends_where_the_score_test_rejects(successes: int, n: int) -> None:
    """At each end p, the found proportion is z standard errors of p away; but for an end at 0 or 1, which is exact."""
    found = wilson(successes, n)
    assert all(type(end) is float for end in found)
    for end in found:
        if end not in (0.0, 1.0):
            assert abs(successes / n - end) == pytest.approx(Z95 * np.sqrt(end * (1 - end) / n), rel=1e-9)
    assert (found[0] == 0.0) == (successes == 0)
    assert (found[1] == 1.0) == (successes == n)


def loop_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = [(c, r) for c, r in zip(confidence, right, strict=True) if min(int(c * bins), bins - 1) == b]
        if inside:
            gap = abs(np.mean([r for _, r in inside]) - np.mean([c for c, _ in inside]))
            total += len(inside) / len(confidence) * gap
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_the_loop_s(rng: np.random.Generator, bins: int) -> None:
    confidence = np.concatenate([rng.uniform(0.5, 1, 300), [0.5, 1.0, 1.0]])
    right = rng.random(303) < 0.8
    assert calibration_error(confidence, right, bins) == pytest.approx(loop_calibration_error(confidence, right, bins))


def test_calibration_error_of_known_cases() -> None:
    half = np.arange(10) < 5
    assert calibration_error(np.full(10, 0.55), half) == pytest.approx(0.05)
    assert calibration_error(np.full(10, 1.0), half) == pytest.approx(0.5)
    # Errors of different bins do not cancel, those of one bin do.
    confidence = np.array([0.55, 0.55, 0.95, 0.95])
    right = np.array([True, True, True, False])
    assert calibration_error(confidence, right) == pytest.approx(0.45)
    assert calibration_error(confidence, right, bins=1) == pytest.approx(0.0)
    # The last bin ends in 1, included.
    assert calibration_error(np.array([0.95, 1.0]), np.array([True, False])) == pytest.approx(0.475)


def test_calibration_interval_is_that_of_resampled_examples(rng: np.random.Generator) -> None:
    confidence = rng.uniform(0.5, 1, 200)
    right = rng.random(200) < confidence
    low, high = calibration_interval(confidence, right, seed=3, draws=50)
    again = np.random.default_rng(3)
    errors = []
    for _ in range(50):
        at = again.integers(0, 200, 200)
        errors.append(loop_calibration_error(confidence[at], right[at], 10))
    assert (low, high) == pytest.approx(tuple(np.quantile(errors, [0.025, 0.975])))
    assert calibration_interval(confidence, right, seed=3, draws=50) == (low, high)
    assert calibration_interval(confidence, right, seed=4, draws=50) != (low, high)


def test_paired_difference_is_scipy_s_paired_test(rng: np.random.Generator) -> None:
    first = rng.normal(size=2000)
    second = first + rng.normal(0.1, 0.3, 2000)
    result = paired(first, second)
    expected = stats.ttest_rel(second, first)
    assert result.difference == pytest.approx(np.mean(second) - np.mean(first))
    assert result.difference / result.difference_stderr == pytest.approx(expected.statistic)
    low, high = expected.confidence_interval(0.95)
    assert result.difference_interval == pytest.approx((low, high), rel=1e-3)  # Student's t and the normal
    assert result.to_json()["difference_interval"] == list(result.difference_interval)


def test_pairing_is_worth_something(rng: np.random.Generator) -> None:
    first = rng.random(500) < 0.7
    second = np.where(rng.random(500) < 0.02, ~first, first)
    result = paired(first.astype(float), second.astype(float))
    apart = np.hypot(standard_error(first.astype(float)), standard_error(second.astype(float)))
    assert result.difference_stderr < apart / 3


def test_paired_difference_and_its_error_follow_from_the_flips(rng: np.random.Generator) -> None:
    first, second = rng.random(400) < 0.8, rng.random(400) < 0.75
    changed = flips(first, second)
    lost, won = changed["right_to_wrong"], changed["wrong_to_right"]
    result = paired(first.astype(float), second.astype(float))
    assert result.difference == pytest.approx((won - lost) / 400)
    variance = ((won + lost) - (won - lost) ** 2 / 400) / 399
    assert result.difference_stderr == pytest.approx(np.sqrt(variance / 400))


def test_flips_count_both_ways() -> None:
    first = np.array([True, True, True, False, False])
    second = np.array([True, False, False, True, False])
    assert flips(first, second) == {"right_to_wrong": 2, "wrong_to_right": 1}


def test_majority_is_the_best_constant_answer() -> None:
    assert majority(np.array([0, 1, 1, 2, 1])) == pytest.approx(0.6)
    assert majority(np.array([2, 2, 2])) == 1.0


@pytest.mark.parametrize(
    ("right", "chance"),
    [
        (50, True),  # 0.50 against 0.60
        (60, True),
        (69, True),  # 0.69 - 0.60 = 0.09, two standard errors are 0.0930
        (70, False),  # 0.70 - 0.60 = 0.10, two standard errors are 0.0921
        (100, False),
    ],
)
def test_chance_is_within_two_standard_errors_of_the_majority(right: int, chance: bool) -> None:
    labels = np.arange(100) % 5 // 3  # 60 zeros
    assert majority(labels) == 0.6
    assert at_chance(np.arange(100) < right, labels) == chance


def test_a_constant_answer_is_at_chance(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, 872)
    assert at_chance(labels == 0, labels)
    assert at_chance(labels == 1, labels)
    assert not at_chance(labels == labels, labels)
