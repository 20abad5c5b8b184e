"""Latency of several models side by side: warmed up, interleaved, medians with percentiles, compilation apart."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.inputs.reading import Record
from chai_jax.machine.memory import program_bytes
from chai_jax.model.cache import cache_bytes
from chai_jax.model.model import Model
from chai_jax.model.params import fold_projections
from chai_jax.model.sharding import one_device
from chai_jax.score.loglikelihood import target_logprobs
from chai_jax.score.questions import Questions, most_rows
from chai_jax.serve.decode import NEVER, bucket, cast, decode, prefill
from chai_jax.serve.sample import Sampling

MEASURES = ("score_ms_per_example", "prefill_ms", "decode_ms_per_token")
ANSWERS = (4, 5)  # the two tokens that a question may be answered with; any two would do


@dataclass(frozen=True)
class Shape:
    """What is timed: prompts of equal length, continued by `new_tokens` each; and as many questions.

    The first new token comes from reading the prompt, so that `new_tokens` decoding steps make `new_tokens` + 1.
    A question of `question` tokens has two answers of one token each, as those of SST-2.
    """

    batch: int = 8
    prompt: int = 32
    new_tokens: int = 32
    question: int = 32

    def fit(self, positions: int) -> "Shape":
        """The same where it fits the position table, else halves of what there is."""
        question = min(self.question, positions)
        if self.prompt + self.new_tokens <= positions:
            return Shape(self.batch, self.prompt, self.new_tokens, question)
        return Shape(self.batch, positions // 2, positions - positions // 2, question)

    def inputs(self, vocabulary: int, seed: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B Q"]]:
        """Random prompts and questions, int32, the same for every model of one vocabulary."""
        random = np.random.default_rng(seed)
        sizes = (self.batch, self.prompt), (self.batch, self.question)
        prompts, questions = (random.integers(4, vocabulary, size, np.int32) for size in sizes)
        return prompts, questions


@runtime_checkable
class Contender(Protocol):
    """A model at one shape in some framework, ready to run. Decoding is greedy, and no sequence stops early.

    Attributes:
        compile_seconds: spent before the first run, which warms up as well.
        bytes: what is held, by name.
    """

    compile_seconds: float
    bytes: dict[str, int]

    def score(self) -> tuple[float, Any]:
        """Milliseconds, and the answers' log-probabilities [B, 2] in nats."""

    def generate(self) -> tuple[float, float, Any]:
        """Milliseconds of reading the prompts (first token included) and of all steps; the new tokens [B, N + 1]."""


Build = Callable[[Shape, int], Contender]


def latency(
    models: Mapping[str, Model], shape: Shape | None = None, trials: int = 9, seed: int = 0
) -> dict[str, Record]:
    """`race` of models that share a vocabulary, at a shape that is cut to fit the shortest position table.

    Raises:
        InputError: no models, models of different vocabularies, fewer than one trial.
    """
    check_comparable(models.values())
    shape = (shape or Shape()).fit(min(model.config.max_positions for model in models.values()))
    dtype, *others = {model.how.dtype.name for model in models.values()}
    if others:
        raise InputError("the models compute in two dtypes; expected one: load them with the same execution")
    return race({name: partial(Timed, model) for name, model in models.items()}, shape, dtype, trials, seed)


def check_comparable(models: Iterable[Model]) -> None:
    """Raise InputError unless there are models, all of one vocabulary, so that all can read the same tokens."""
    if len({model.config.vocab_size for model in models}) != 1:
        raise InputError("expected one or more models of one vocabulary to time side by side: leave the others out")


def race(
    entrants: Mapping[str, Build],
    shape: Shape,
    dtype: str,
    trials: int = 9,
    seed: int = 0,
    tokens: int = 0,
    beside: Callable[[], object] | None = None,
) -> dict[str, Record]:
    """Time scoring, prefill and decoding of every entrant, one after the other within each of `trials` rounds.

    Weights are cast to the compute dtype beforehand: all models are in memory at once, in that dtype. Prompts are
    random tokens, no sequence stops early, and decoding is greedy.

    Args:
        dtype: that all of them compute in.
        tokens: decode at least that many tokens more with every entrant, for their mean.
        beside: called once a round, before the first entrant.

    Returns:
        Per entrant, for each of `MEASURES`, the median, p10 and p90 in milliseconds: `score_ms_per_example`;
        `prefill_ms` of the batch, first token included; `decode_ms_per_token`, which is one step of the whole batch.
        `ratio_to_first`: the same of the ratios to the first entrant, taken round by round.
        `compile_seconds` of the three programs; `bytes` (see `Timed.bytes`); the shape, trials, device and dtype.
        With `tokens`, `long_run` (see there).

    Raises:
        InputError: fewer than one trial.
    """
    if trials < 1:
        raise InputError(f"trials is {trials}; expected at least 1")
    ready = {name: build(shape, seed) for name, build in track(list(entrants.items()), "Compiling", len(entrants))}
    rounds = interleaved({name: partial(lap, contender, shape) for name, contender in ready.items()}, trials, beside)
    means = long_run(ready, shape, tokens) if tokens else {}
    first = next(iter(rounds.values()))
    common = {"n": trials, **asdict(shape), "seed": seed}
    common |= {"device": jax.devices()[0].device_kind, "dtype": dtype}
    return {
        name: {
            **_percentiles(rounds[name]),
            "ratio_to_first": _percentiles(rounds[name] / first),
            "compile_seconds": round(contender.compile_seconds, 3),
            "bytes": contender.bytes,
            **({"long_run": means[name]} if tokens else {}),
            **common,
        }
        for name, contender in ready.items()
    }


def interleaved(
    laps: Mapping[str, Callable[[], Sequence[float]]], trials: int, beside: Callable[[], object] | None = None
) -> dict[str, Float[np.ndarray, "N measures"]]:
    """What each lap measures in each of `trials` rounds, one lap after the other within a round.

    Args:
        beside: called once a round, before the first lap.
    """
    for run in laps.values():
        run()  # the first run of a program is slower than the rest
    rounds: dict[str, list[Sequence[float]]] = {name: [] for name in laps}
    for _ in track(range(trials), "Timing"):
        if beside is not None:
            beside()
        for name, run in laps.items():
            rounds[name].append(run())
    return {name: np.array(found) for name, found in rounds.items()}


def lap(contender: Contender, shape: Shape) -> list[float]:
    """Run a contender once; milliseconds in the order and units of `MEASURES`."""
    scoring, _ = contender.score()
    prefilling, decoding, _ = contender.generate()
    return [scoring / shape.batch, prefilling, decoding / shape.new_tokens]


def long_run(ready: Mapping[str, Contender], shape: Shape, tokens: int) -> dict[str, Record]:
    """The mean over at least `tokens` decoded tokens of each contender, in turns of one batch of completions.

    Returns:
        Per contender `tokens` (really decoded), `decode_ms_per_token` (mean over all steps, each of the whole batch)
        and `stderr` of it over the turns (None of a single turn), both in milliseconds.
    """
    each = shape.batch * shape.new_tokens
    turns = -(-tokens // each)
    steps: dict[str, list[float]] = {name: [] for name in ready}
    for _ in track(range(turns), f"Decoding {turns * each:,} tokens"):
        for name, contender in ready.items():
            steps[name].append(contender.generate()[1] / shape.new_tokens)
    return {
        name: {
            "tokens": turns * each,
            "decode_ms_per_token": float(np.mean(found)),
            "stderr": float(np.std(found, ddof=1)) / math.sqrt(turns) if turns > 1 else None,
        }
        for name, found in steps.items()
    }


def _percentiles(rounds: Float[np.ndarray, "N 3"]) -> dict[str, dict[str, float]]:
    """`percentiles` of each measure over the rounds."""
    return {measure: percentiles(rounds[:, column]) for column, measure in enumerate(MEASURES)}


def percentiles(rounds: Float[np.ndarray, " N"]) -> dict[str, float]:
    """The median and the 10th and 90th percentile."""
    low, median, high = np.percentile(rounds, [10, 50, 90]).tolist()
    return {"median": median, "p10": low, "p90": high}


class Timed:
    """The contender of this package: a model's three programs, compiled, with their inputs.

    Attributes:
        compile_seconds: tracing and compiling, of all three.
        bytes: `weights` as stored and `weights_resident` in the compute dtype; `kv` of the allocated cache and
            `kv_formula` for its capacity; `decode_peak`, all that the decode program holds by XLA's account.
    """

    def __init__(self, model: Model, shape: Shape, seed: int) -> None:
        self.shape, self.compile_seconds = shape, 0.0
        how, what = model.how.replace(layout=one_device()), (model.config, model.spec)
        # As `serving_params` on one device.
        self.params = jax.block_until_ready(fold_projections(cast(model.params, how)))
        tokens, questions = shape.inputs(model.config.vocab_size, seed)
        prompts = jnp.asarray(tokens)
        self.questions = split_questions(questions)
        self.prompts = prompts, jnp.ones(prompts.shape, bool), jax.random.split(jax.random.key(seed), shape.batch)
        self.rule = Sampling.checked(), jnp.int32(NEVER)
        self.until = jnp.int32(shape.new_tokens + 1)  # reading the prompts makes one
        capacity = bucket(shape.prompt + shape.new_tokens + 1)

        self._score = self._compiled(target_logprobs, *what, how, self.params, self.questions[0])
        start = partial(self._compiled, prefill, *what, self.params, *self.prompts, *self.rule)
        self._prefill = start(capacity=capacity, how=how)
        state = self._prefill(self.params, *self.prompts, *self.rule)
        self._decode = self._compiled(decode, *what, self.params, state, self.until, *self.rule, how=how)

        self.bytes = {
            "weights": model.nbytes,
            "weights_resident": sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)),
            "kv": state.cache.nbytes,
            "kv_formula": cache_bytes(model.spec, shape.batch, capacity),
            "decode_peak": program_bytes(self._decode),
        }

    def _compiled(self, function: Any, *args: Any, **static: Any) -> Any:
        began = time.perf_counter()
        program = function.lower(*args, **static).compile()
        self.compile_seconds += time.perf_counter() - began
        return program

    def score(self) -> tuple[float, Any]:
        milliseconds, found = clock(lambda: [self._score(self.params, piece) for piece in self.questions])
        return milliseconds, jnp.concatenate([logprobs for logprobs, _ in found])[: self.shape.batch]

    def generate(self) -> tuple[float, float, Any]:
        prefilling, state = clock(lambda: self._prefill(self.params, *self.prompts, *self.rule))
        decoding, state = clock(lambda: self._decode(self.params, state, self.until, *self.rule))
        start = self.shape.prompt
        return prefilling, decoding, state.tokens[:, start : start + self.shape.new_tokens + 1]


def split_questions(questions: Int[np.ndarray, "B Q"]) -> list[Questions]:
    """Questions in equal batches, no larger than scoring makes them; those that fill up the last one are empty."""
    batch, length = questions.shape
    count = -(-batch // most_rows(length))
    rows = -(-batch // count)
    tokens, lengths = np.zeros((count * rows, length), np.int32), np.zeros(count * rows, np.int32)
    tokens[:batch], lengths[:batch] = questions, length
    answers = jnp.tile(jnp.array(ANSWERS, jnp.int32), (rows, 1, 1))

    def piece(tokens: Any, lengths: Any) -> Questions:
        return Questions(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(np.maximum(lengths - 1, 0)), answers)

    return [piece(*part) for part in zip(np.split(tokens, count), np.split(lengths, count), strict=True)]


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds until all of the result is there, and the result."""
    began = time.perf_counter()
    result = jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - began), result
