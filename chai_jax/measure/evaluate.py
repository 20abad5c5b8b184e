"""Accuracy on multiple-choice tasks and perplexity on text, each with what it takes to believe the number.

Choices are ranked as the lm-evaluation-harness ranks them: by the summed log-probability of their tokens (acc), or by
that per character (acc_norm). Scoring runs the ordinary forward pass, which reads keys and values through the cache's
storage format, so every figure carries the damage of a compressed cache.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from chai_jax.data.batches import Encoded, encode
from chai_jax.data.tasks import Row, Task, get_task, load_rows
from chai_jax.data.text import read_text, windows
from chai_jax.errors import InputError
from chai_jax.files.atomic import write_text
from chai_jax.measure.statistics import (
    at_chance,
    calibration_error,
    calibration_interval,
    flips,
    majority,
    paired,
    standard_error,
    wilson,
)
from chai_jax.model.model import Model
from chai_jax.score import loglikelihoods

BATCH_SIZE = 32
Metrics = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Result:
    """One model's answers to N questions of A choices each; everything reported is derived from them.

    Attributes:
        loglikelihoods: summed log-probability of each choice, in nats.
        greedy: whether greedy decoding would have produced the choice.
        characters: length of each choice, without its leading space.
        normalised: whether the harness reports acc_norm for this task.
        baseline: another model's answers to the same questions, to compare with.
        seed: of the bootstrap.
    """

    task: str
    labels: Int[np.ndarray, " N"]
    loglikelihoods: Float[np.ndarray, "N A"]
    greedy: Bool[np.ndarray, "N A"]
    characters: Int[np.ndarray, "N A"]
    normalised: bool = False
    baseline: "Result | None" = None
    seed: int = 0

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
    def right_norm(self) -> Bool[np.ndarray, " N"]:
        """Which were, ranking by log-likelihood per character (acc_norm)."""
        return (self.loglikelihoods / self.characters).argmax(axis=1) == self.labels

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
        if self.normalised:
            found |= _accuracy("acc_norm", self.right_norm)
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
        columns = {
            "label": self.labels,
            "prediction": self.predictions,
            "right": self.right,
            "loglikelihoods": self.loglikelihoods,
            "greedy": self.greedy,
            "characters": self.characters,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [{"task": self.task, "index": index, **dict(zip(columns, row, strict=True))} for index, row in enumerate(rows)]

    @classmethod
    def from_samples(cls, samples: Sequence[Mapping[str, Any]]) -> "Result":
        """Rebuild a result of a known task from `samples`.

        Raises:
            InputError: they are not what `samples` gives.
        """
        try:
            names = ("label", "loglikelihoods", "greedy", "characters")
            labels, scores, greedy, characters = ([sample[name] for sample in samples] for name in names)
            name = samples[0]["task"]
            values = np.array(labels, int), np.array(scores, float), np.array(greedy, bool), np.array(characters, int)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"not the samples of a result ({error!r}); expected what Result.samples gives") from None
        return cls(name, *values, normalised=get_task(name).normalised)

    def write_samples(self, path: str | Path) -> None:
        """Write `samples` as JSON lines, atomically."""
        write_text(Path(path), "".join(json.dumps(sample) + "\n" for sample in self.samples()))


def _accuracy(name: str, right: Bool[np.ndarray, " N"]) -> Metrics:
    return {
        name: float(right.mean()),
        f"{name}_stderr": standard_error(right.astype(float)),
        f"{name}_interval": list(wilson(int(right.sum()), len(right))),
    }


def evaluate(
    model: Model,
    task: str | Task,
    split: str = "validation",
    data_dir: str | Path | None = None,
    limit: int | None = None,
    baseline: Result | Model | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> Result:
    """Accuracy of a model on a split of SST-2, RTE or PIQA, as the lm-evaluation-harness measures it (zero-shot).

    Args:
        data_dir: holds TASK/SPLIT.jsonl[.gz]; without it the data come from the Hugging Face hub.
        limit: only the first questions.
        baseline: what to compare with, question by question; a model is evaluated first.
        batch_size: sequences per device and batch.
        seed: of the bootstrap interval of the calibration error.

    Raises:
        InputError: no such task or data, fewer than two questions, a model without a tokenizer, a baseline that
            answered other questions.
    """
    task = get_task(task) if isinstance(task, str) else task
    rows = load_rows(task, split, data_dir, limit)
    if isinstance(baseline, Model):
        baseline = evaluate_rows(baseline, task, rows, batch_size, seed)
    result = evaluate_rows(model, task, rows, batch_size, seed)
    return result if baseline is None else result.against(baseline)


def evaluate_rows(
    model: Model, task: Task, rows: Sequence[Row], batch_size: int = BATCH_SIZE, seed: int = 0
) -> Result:
    """`evaluate` on given rows of a task."""
    if len(rows) < 2:
        raise InputError(f"{len(rows)} example of {task.name} has no standard error; expected at least 2: raise the limit")
    tokenizer = _tokenizer(model)
    requests = [task.request(row) for row in rows]
    encoded = [
        encode(tokenizer, request.context, choice, model.config.max_positions)
        for request in requests
        for choice in request.choices
    ]
    scores = loglikelihoods(model, encoded, batch_size, f"Scoring {task.name}").reshape(len(rows), -1, 2)
    characters = [[len(choice.removeprefix(" ")) for choice in request.choices] for request in requests]
    labels = np.array([request.label for request in requests])
    return Result(
        task.name, labels, scores[..., 0], scores[..., 1] > 0, np.array(characters), task.normalised, seed=seed
    )


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise InputError(f"{model.source or 'the model'} has no tokenizer; expected one: load it with its tokenizer files")
    return model.tokenizer


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
        """Losses whose mean is `loss`: of each window, per token of a mean window."""
        return self.losses / self.tokens.mean()

    def against(self, baseline: "TextResult") -> "TextResult":
        """The same losses, to be compared with `baseline`'s.

        Raises:
            InputError: those are of other windows.
        """
        if not np.array_equal(baseline.tokens, self.tokens):
            raise InputError("the baseline read other windows: measure both on the same text with the same window")
        return dataclasses.replace(self, baseline=baseline)

    def metrics(self) -> Metrics:
        """All figures as JSON values; the errors take windows as independent, tokens of a window not."""
        # A short window's loss is small because it is short: the error is that of the ratio (Cochran 1977, section 6.4).
        error = standard_error((self.losses - self.loss * self.tokens) / self.tokens.mean())
        perplexity = math.exp(self.loss)
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
        """One JSON object per window; `from_samples` gives the result back (without the size of its text)."""
        pairs = zip(self.losses.tolist(), self.tokens.tolist(), strict=True)
        return [{"index": index, "loss": loss, "tokens": tokens} for index, (loss, tokens) in enumerate(pairs)]

    @classmethod
    def from_samples(cls, samples: Sequence[Mapping[str, Any]]) -> "TextResult":
        """Rebuild a result from `samples`."""
        return cls(np.array([sample["loss"] for sample in samples]), np.array([sample["tokens"] for sample in samples]))


def evaluate_windows(
    model: Model, encoded: Sequence[Encoded], batch_size: int = BATCH_SIZE, text_bytes: int | None = None
) -> TextResult:
    """Loss of a model on windows of a text (see `chai_jax.data.text.windows`).

    Raises:
        InputError: fewer than two windows, which have no standard error.
    """
    if len(encoded) < 2:
        raise InputError(f"{len(encoded)} window of text has no standard error; expected at least 2: give a longer text")
    losses = -loglikelihoods(model, encoded, batch_size, "Reading")[:, 0]
    return TextResult(losses, np.array([len(window.tokens) - window.start for window in encoded]), text_bytes)


def perplexity(model: Model, text: str | Path, window: int | None = None, batch_size: int = BATCH_SIZE) -> Metrics:
    """Token perplexity of a whole text in non-overlapping windows, each `</s>` and `window` - 1 tokens of the text.

    Args:
        text: the text itself, or the `Path` of a file (gzipped or not).
        window: the model's number of positions if not given.

    Returns:
        `TextResult.metrics`: n (tokens), perplexity, loss (nats per token), their standard errors, bits_per_byte.

    Raises:
        InputError: an unreadable file, less than two windows of text, a window out of range, no tokenizer.
    """
    window = model.config.max_positions if window is None else window
    if not 2 <= window <= model.config.max_positions:
        raise InputError(f"window is {window}; expected 2 to the model's {model.config.max_positions} positions")
    text = read_text(text) if isinstance(text, Path) else text
    encoded = windows(_tokenizer(model), text, window)
    return evaluate_windows(model, encoded, batch_size, len(text.encode())).metrics()
