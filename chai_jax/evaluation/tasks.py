"""Accuracy on multiple-choice tasks and perplexity on text.

Choices are ranked as the lm-evaluation-harness ranks them: by the summed log-probability of their tokens (acc), or by
that per character (acc_norm) or another unit of length. Scoring runs the ordinary forward pass, which reads keys and
values through the cache's storage format, so every figure carries the damage of a compressed cache.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from chai_jax.data.batches import Encoded, Example, encode_all
from chai_jax.data.multiple_choice import Row, Task
from chai_jax.data.tasks import get_task, load_rows
from chai_jax.data.text import read_text_file, windows
from chai_jax.data.tokens import require_tokenizer
from chai_jax.errors import InputError
from chai_jax.evaluation.result import Metrics, Result, TextResult
from chai_jax.model.model import Model
from chai_jax.score.loglikelihood import loglikelihoods

__all__ = ["Result", "TextResult", "evaluate", "evaluate_rows", "evaluate_text", "evaluate_windows", "perplexity"]

BATCH_SIZE = 32
LONGEST_WINDOW = 2048  # if nothing is said: attention to all of 131,072 positions would take a CPU for ever


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
    """Accuracy of a model on a split of a task, as the lm-evaluation-harness measures it (zero-shot).

    Args:
        task: one of `TASKS`, by its name too, or the path of a task file (docs/tasks.md).
        data_dir: holds TASK/SPLIT.jsonl[.gz], or what a task file names; without it the data come from the Hugging Face
            hub, or from beside the task file.
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


def evaluate_rows(model: Model, task: Task, rows: Sequence[Row], batch_size: int = BATCH_SIZE, seed: int = 0) -> Result:
    """`evaluate` on given rows of a task."""
    if len(rows) < 2:
        raise InputError(
            f"{len(rows)} example of {task.name} has no standard error; expected at least 2: raise the limit"
        )
    tokenizer = require_tokenizer(model.tokenizer, model.source)
    questions = [task.question(row) for row in rows]
    examples = [Example(question.context, choice) for question in questions for choice in question.choices]
    encoded = encode_all(tokenizer, examples, model.config.max_positions)
    scores = loglikelihoods(model, encoded, batch_size, f"Scoring {task.name}")
    counts = np.array([len(question.choices) for question in questions])
    labels = np.array([question.label for question in questions])
    totals, greedy = table(scores[:, 0], counts, -np.inf), table(scores[:, 1] > 0, counts, False)
    if task.normalise == "none":
        return Result(task.name, labels, totals, greedy, seed=seed)
    size = LENGTHS[task.normalise]
    lengths = [
        size(example.completion.removeprefix(task.delimiter), tokens)
        for example, tokens in zip(examples, encoded, strict=True)
    ]
    return Result(
        task.name, labels, totals, greedy, table(np.array(lengths), counts, 1), seed=seed, unit=task.normalise
    )


# How long an answer is, by unit: of its text without what stands before it, and of what is scored.
LENGTHS: dict[str, Callable[[str, Encoded], int]] = {
    "characters": lambda text, encoded: len(text),
    "bytes": lambda text, encoded: len(text.encode()),
    "tokens": lambda text, encoded: len(encoded.tokens) - encoded.start,
}


def table(values: Shaped[np.ndarray, " M"], counts: Int[np.ndarray, " N"], fill: float) -> Shaped[np.ndarray, "N A"]:
    """Rows of `counts` values each, one after the other, filled up to the longest with `fill`."""
    found = np.full((len(counts), counts.max()), fill, values.dtype)
    found[np.arange(counts.max()) < counts[:, None]] = values
    return found


def evaluate_windows(
    model: Model, encoded: Sequence[Encoded], batch_size: int = BATCH_SIZE, text_bytes: int | None = None
) -> TextResult:
    """Loss of a model on windows of a text (see `chai_jax.data.text.windows`).

    Raises:
        InputError: fewer than two windows, which have no standard error.
    """
    if len(encoded) < 2:
        raise InputError(
            f"{len(encoded)} window of text has no standard error; expected at least 2: give a longer text"
        )
    losses = -loglikelihoods(model, encoded, batch_size, "Reading")[:, 0]
    return TextResult(losses, np.array([len(window.tokens) - window.start for window in encoded]), text_bytes)


def evaluate_text(
    model: Model,
    text: str | Path,
    window: int | None = None,
    limit: int | None = None,
    baseline: Model | None = None,
    batch_size: int = BATCH_SIZE,
) -> TextResult:
    """Loss of a model on a text, read in windows that do not overlap (see `chai_jax.data.text.windows`).

    Args:
        text: the text itself, or the `Path` of a file (gzipped or not).
        window: tokens of a window; if not given, the model's positions, at most `LONGEST_WINDOW`.
        limit: only the first windows.
        baseline: a model to compare with, window by window.
        batch_size: windows per device and batch.

    Raises:
        InputError: an unreadable file, less than two windows of text, a window out of range, no tokenizer, a baseline
            that cuts the text into other tokens.
    """
    most = model.config.max_positions
    window = min(most, LONGEST_WINDOW) if window is None else window
    if not 2 <= window <= most:
        raise InputError(f"window is {window}; expected 2 to the model's {most} positions")
    if limit is not None and limit < 2:
        raise InputError(f"limit is {limit}; expected at least 2 windows, or there is no standard error")
    text = read_text_file(text) if isinstance(text, Path) else text
    results = []
    for one in (model, *([] if baseline is None else [baseline])):
        encoded = windows(require_tokenizer(one.tokenizer, one.source), text, window)
        size = len(text.encode()) if limit is None or limit >= len(encoded) else None
        results.append(evaluate_windows(one, encoded[:limit], batch_size, size))
    return results[0] if baseline is None else results[0].against(results[1])


def perplexity(model: Model, text: str | Path, window: int | None = None, batch_size: int = BATCH_SIZE) -> Metrics:
    """Token perplexity of a text: `evaluate_text(...).metrics()`.

    Returns:
        n (tokens), windows, perplexity, loss (nats per token), their standard errors, bits_per_byte.
    """
    return evaluate_text(model, text, window, batch_size=batch_size).metrics()
