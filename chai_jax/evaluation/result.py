"""What a measurement leaves: a model's answers or losses one by one, and every figure derived from them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from chai_jax.errors import InputError
from chai_jax.evaluation.statistics import (
    at_chance,
    calibration_error,
    calibration_interval,
    flips,
    majority,
    paired,
    standard_error,
    wilson,
)
from chai_jax.files.atomic import write_jsonl

Metrics = dict[str, Any]

# What the accuracy by log-likelihood per unit of length is called; the harness has the first two.
BY_LENGTH = {"characters": "acc_norm", "bytes": "acc_bytes", "tokens": "acc_tokens"}


@dataclass(frozen=True, eq=False)
class Result:
    """One model's answers to N questions of A choices each; everything reported is derived from them.

    Attributes:
        loglikelihoods: summed log-probability of each choice, in nats; -inf where a question has fewer than A choices.
        greedy: whether greedy decoding would have produced the choice.
        lengths: of each choice without the space before it, where accuracy is also judged by log-likelihood per `unit`.
        baseline: another model's answers to the same questions, to compare with.
        seed: of the bootstrap.
        unit: of `lengths`: a key of `BY_LENGTH`.
    """

    task: str
    labels: Int[np.ndarray, " N"]
    loglikelihoods: Float[np.ndarray, "N A"]
    greedy: Bool[np.ndarray, "N A"]
    lengths: Int[np.ndarray, "N A"] | None = None
    baseline: "Result | None" = None
    seed: int = 0
    unit: str = "characters"

    @property
    def n(self) -> int:
        """How many questions were answered."""
        return len(self.labels)

    @property
    def predictions(self) -> Int[np.ndarray, " N"]:
        """The chosen answers; the first of equals, as in the harness."""
        return self.loglikelihoods.argmax(axis=1)

    @property
    def right(self) -> Bool[np.ndarray, " N"]:
        """Which questions were answered rightly (acc)."""
        return self.predictions == self.labels

    @property
    def right_by_length(self) -> Bool[np.ndarray, " N"] | None:
        """Which were answered rightly by log-likelihood per unit of length; None without lengths."""
        if self.lengths is None:
            return None
        with np.errstate(divide="ignore"):  # an answer without length is never chosen
            found: Bool[np.ndarray, " N"] = (self.loglikelihoods / self.lengths).argmax(axis=1) == self.labels
        return found

    @property
    def confidence(self) -> Float[np.ndarray, " N"]:
        """Probability of the chosen answer among the choices."""
        gaps = self.loglikelihoods - self.loglikelihoods.max(axis=1, keepdims=True)
        return 1 / np.exp(gaps).sum(axis=1)

    @property
    def acc(self) -> float:
        return float(self.right.mean())

    @property
    def acc_stderr(self) -> float:
        return standard_error(self.right.astype(float))

    def against(self, baseline: "Result") -> "Result":
        """The same answers, to be compared with `baseline`'s.

        Raises:
            InputError: those are answers to other questions.
        """
        if baseline.task != self.task or not np.array_equal(baseline.labels, self.labels):
            raise InputError(
                f"the baseline answered {baseline.n} questions of {baseline.task}, not these {self.n} of {self.task}: "
                "evaluate both on the same examples"
            )
        return dataclasses.replace(self, baseline=baseline)

    def metrics(self) -> Metrics:
        """All figures as JSON values: fractions for accuracies, nats for losses, [low, high] for 95 % intervals."""
        losses = -self.loglikelihoods[np.arange(self.n), self.labels]
        found: Metrics = {"n": self.n, **_accuracy("acc", self.right)}
        if self.right_by_length is not None:
            found |= _accuracy(BY_LENGTH[self.unit], self.right_by_length)
        found |= {
            "ece": calibration_error(self.confidence, self.right),
            "ece_interval": list(calibration_interval(self.confidence, self.right, self.seed)),
            "loss": float(losses.mean()),
            "loss_stderr": standard_error(losses),
            "majority": majority(self.labels),
            "at_chance": at_chance(self.right, self.labels),
        }
        if self.baseline is not None:
            found |= paired(self.baseline.right.astype(float), self.right.astype(float)).to_json()
            found["flips"] = flips(self.baseline.right, self.right)
        return found

    def samples(self) -> list[dict[str, Any]]:
        """One JSON object per question; `from_samples` gives the result back."""
        counts = (self.loglikelihoods != -np.inf).sum(axis=1)

        def own(values: np.ndarray) -> list[list[Any]]:
            return [row[:count] for row, count in zip(values.tolist(), counts, strict=True)]

        columns = {
            "label": self.labels.tolist(),
            "prediction": self.predictions.tolist(),
            "right": self.right.tolist(),
            "loglikelihoods": own(self.loglikelihoods),
            "greedy": own(self.greedy),
        }
        if self.lengths is not None:
            columns[self.unit] = own(self.lengths)
        return _records({"task": [self.task] * self.n, **columns})

    @classmethod
    def from_samples(cls, samples: Sequence[Mapping[str, Any]]) -> "Result":
        """Rebuild a result from `samples`.

        Raises:
            InputError: they are not what `samples` gives.
        """
        labels = _column(samples, "label", int)
        scores, greedy = _table(samples, "loglikelihoods", float, -math.inf), _table(samples, "greedy", bool, False)
        unit = next((name for name in BY_LENGTH if name in samples[0]), None)
        if unit is None:
            return cls(str(samples[0]["task"]), labels, scores, greedy)
        return cls(str(samples[0]["task"]), labels, scores, greedy, _table(samples, unit, int, 1), unit=unit)

    def write_samples(self, path: str | Path) -> None:
        """Write `samples` as JSON lines, atomically."""
        write_jsonl(Path(path), self.samples())


@dataclass(frozen=True, eq=False)
class TextResult:
    """One model's loss on W windows of a text.

    Attributes:
        losses: of each window in nats, summed over its tokens.
        tokens: predicted in each window.
        text_bytes: UTF-8 bytes of the text, where the windows are the whole of it.
        baseline: another model's losses on the same windows, to compare with.
    """

    losses: Float[np.ndarray, " W"]
    tokens: Int[np.ndarray, " W"]
    text_bytes: int | None = None
    baseline: "TextResult | None" = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.losses.sum() / self.tokens.sum())

    @property
    def per_token(self) -> Float[np.ndarray, " W"]:
        """Each window's part in `loss`, which is their mean; their standard error is that of the ratio.

        Windows differ in length: a linearised ratio estimator (Cochran 1977, Sampling Techniques, chapter 6).
        """
        return self.loss + (self.losses - self.loss * self.tokens) / self.tokens.mean()

    def against(self, baseline: "TextResult") -> "TextResult":
        """The same losses, to be compared with `baseline`'s.

        Raises:
            InputError: those are of other windows.
        """
        if not np.array_equal(baseline.tokens, self.tokens):
            raise InputError("the baseline read other windows: measure both on the same text with the same window")
        return dataclasses.replace(self, baseline=baseline)

    def metrics(self) -> Metrics:
        """All figures as JSON values; the errors take windows as independent, tokens of a window not.

        Above 709.78 nats per token the perplexity is infinite; `chai_jax.files.atomic.finite` makes null of that.
        """
        error = standard_error(self.per_token)
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(self.loss))
        found: Metrics = {
            "n": int(self.tokens.sum()),
            "windows": len(self.tokens),
            "loss": self.loss,
            "loss_stderr": error,
            "perplexity": perplexity,
            "perplexity_stderr": perplexity * error,
        }
        if self.text_bytes is not None:
            found["bits_per_byte"] = float(self.losses.sum()) / math.log(2) / self.text_bytes
        if self.baseline is not None:
            found |= paired(self.baseline.per_token, self.per_token).to_json()
        return found

    def samples(self) -> list[dict[str, Any]]:
        """One JSON object per window; `from_samples` gives the result back (but for the text's size)."""
        return _records({"loss": self.losses.tolist(), "tokens": self.tokens.tolist()})

    @classmethod
    def from_samples(cls, samples: Sequence[Mapping[str, Any]]) -> "TextResult":
        """Rebuild a result from `samples`.

        Raises:
            InputError: they are not what `samples` gives.
        """
        return cls(_column(samples, "loss", float), _column(samples, "tokens", int))

    def write_samples(self, path: str | Path) -> None:
        """Write `samples` as JSON lines, atomically."""
        write_jsonl(Path(path), self.samples())


def _accuracy(name: str, right: Bool[np.ndarray, " N"]) -> Metrics:
    return {
        name: float(right.mean()),
        f"{name}_stderr": standard_error(right.astype(float)),
        f"{name}_interval": list(wilson(int(right.sum()), len(right))),
    }


def _records(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of equal length as one JSON object per row, numbered."""
    rows = zip(*columns.values(), strict=True)
    return [{"index": index, **dict(zip(columns, row, strict=True))} for index, row in enumerate(rows)]


def _table(samples: Sequence[Mapping[str, Any]], name: str, kind: type, fill: float) -> np.ndarray:
    """A column of lists, filled up to the longest."""
    lists = [sample.get(name) for sample in samples]
    longest = max((len(each) for each in lists if isinstance(each, list)), default=0)
    filled = [[*each, *[fill] * (longest - len(each))] if isinstance(each, list) else each for each in lists]
    return _column([{name: each} for each in filled], name, kind)


def _column(samples: Sequence[Mapping[str, Any]], name: str, kind: type) -> np.ndarray:
    try:
        column: np.ndarray = np.array([sample[name] for sample in samples], kind)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"samples without a usable {name!r} ({error!r}); expected what a result's samples() gives"
        ) from None
    if not len(column):
        raise InputError("there are no samples; expected what a result's samples() gives")
    return column
