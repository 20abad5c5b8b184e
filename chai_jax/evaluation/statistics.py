"""What a number of right answers is worth: errors, intervals, calibration, and paired comparisons."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
BINS = 10


def standard_error(x: Float[np.ndarray, " N"]) -> float:
    """Standard error of the mean: the sample's deviation over sqrt(N), as lm-eval's `mean_stderr`; nan of one value."""
    return float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927, JASA 22:209).

    It stays inside [0, 1], and has a width at 0 and at n successes too.
    """
    found = binomtest(successes, n).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)


def calibration_error(confidence: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"], bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    It is the mean of |accuracy - mean confidence| over `bins` equal parts of [0, 1], each weighted by its examples.
    From few examples the estimate is too high, since noise does not cancel between bins (Kumar et al. 2019, arXiv
    1909.10155). So is its bootstrap interval.

    Args:
        confidence: probability of the chosen answer among the choices.
    """
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(at, minlength=bins)
    gap = np.abs(np.bincount(at, right, bins) - np.bincount(at, confidence, bins))
    return float(gap[count > 0].sum() / len(confidence))


def calibration_interval(
    confidence: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"], seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `calibration_error` over examples (Efron and Tibshirani 1993)."""
    random = np.random.default_rng(seed)
    errors = []
    for _ in range(draws):
        at = random.integers(0, len(right), len(right))
        errors.append(calibration_error(confidence[at], right[at]))
    low, high = np.percentile(errors, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Two models on the same examples: mean of (second - first), its standard error and 95 % interval.

    Pairing removes the variance that the examples bring to both (Miller 2024, arXiv 2411.00640).
    """

    difference: float
    difference_stderr: float
    difference_interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "difference_interval": list(self.difference_interval)}


def paired(first: Float[np.ndarray, " N"], second: Float[np.ndarray, " N"]) -> Paired:
    """Compare per-example scores of two models on the same N examples."""
    each = np.asarray(second, float) - np.asarray(first, float)
    mean, error = float(each.mean()), standard_error(each)
    return Paired(mean, error, (mean - Z95 * error, mean + Z95 * error))


def flips(first: Bool[np.ndarray, " N"], second: Bool[np.ndarray, " N"]) -> dict[str, int]:
    """Answers that changed sides, which equal accuracies hide (Dutta et al. 2024, arXiv 2407.09141)."""
    return {"right_to_wrong": int((first & ~second).sum()), "wrong_to_right": int((~first & second).sum())}


def majority(labels: Int[np.ndarray, " N"]) -> float:
    """Accuracy of always answering the most frequent label."""
    return float(np.bincount(labels).max() / len(labels))


def at_chance(right: Bool[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> bool:
    """Whether an accuracy is not above the majority label's by more than two standard errors."""
    error = standard_error(right.astype(float))
    return bool(right.mean() <= majority(labels) + 2 * (0.0 if np.isnan(error) else error))
