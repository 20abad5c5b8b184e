"""Latency of several models side by side: warmed up, interleaved, medians with their spread, compilation apart."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from chai_jax.errors import InputError
from chai_jax.model.cache import bytes_per_sequence, bytes_per_token
from chai_jax.model.model import Model, compute_dtype
from chai_jax.model.params import Params
from chai_jax.progress import track
from chai_jax.score import Questions, target_logprobs
from chai_jax.serve.generate import NEVER, bucket, cast, decode, prefill
from chai_jax.serve.sample import Sampling

Record = dict[str, Any]
MEASURES = ("score_ms_per_example", "prefill_ms", "decode_ms_per_token")


@dataclass(frozen=True)
class Shape:
    """What is timed: prompts of equal length, continued by `new_tokens` each; and as many questions of that length.

    A question has two answers of one token each, as those of SST-2.
    """

    batch: int = 8
    prompt: int = 32
    new_tokens: int = 32

    def fit(self, positions: int) -> "Shape":
        """The same where it fits the position table, else halves of what there is."""
        if self.prompt + self.new_tokens <= positions:
            return self
        return Shape(self.batch, positions // 2, positions - positions // 2)


def latency(
    models: Mapping[str, Model], shape: Shape | None = None, trials: int = 9, seed: int = 0
) -> dict[str, Record]:
    """Time scoring, prefill and decoding of every model, one after the other within each of `trials` rounds.

    Weights are cast to the compute dtype beforehand, so all models are in memory at once in that dtype. Prompts are
    random tokens, no sequence stops early, and decoding is greedy.

    Returns:
        Per model, for each of `MEASURES`, the median, p10 and p90 in milliseconds: `score_ms_per_example`;
        `prefill_ms` of the batch, first token included; `decode_ms_per_token`, which is one step of the whole batch.
        `ratio_to_first`: the same of the ratios to the first model, taken round by round.
        `compile_seconds` of the three programs; `bytes` (see `Timed.bytes`); the shape, trials, device and dtype.

    Raises:
        InputError: no models, models of different vocabularies, fewer than one trial.
    """
    if not models or len({model.config.vocab_size for model in models.values()}) > 1:
        raise InputError("expected one or more models of one vocabulary to time side by side: leave the others out")
    if trials < 1:
        raise InputError(f"trials is {trials}; expected at least 1")
    shape = (shape or Shape()).fit(min(model.config.max_positions for model in models.values()))
    timed = {name: Timed(model, shape, seed) for name, model in track(list(models.items()), "Compiling", len(models))}
    for model in timed.values():
        model.round()  # the first run of a program is slower than the rest
    rounds: dict[str, list[list[float]]] = {name: [] for name in timed}
    for _ in track(range(trials), "Timing"):
        for name, model in timed.items():
            rounds[name].append(model.round())
    first = np.array(next(iter(rounds.values())))
    common = {"n": trials, **asdict(shape), "seed": seed}
    common |= {"device": jax.devices()[0].device_kind, "dtype": np.dtype(compute_dtype()).name}
    return {
        name: {
            **_spread(np.array(rounds[name])),
            "ratio_to_first": _spread(np.array(rounds[name]) / first),
            "compile_seconds": round(model.compile_seconds, 3),
            "bytes": model.bytes,
            **common,
        }
        for name, model in timed.items()
    }


def _spread(rounds: Float[np.ndarray, "N 3"]) -> dict[str, dict[str, float]]:
    """Of each measure the median and the 10th and 90th percentile over the rounds."""
    low, median, high = np.percentile(rounds, [10, 50, 90], axis=0).tolist()
    return {
        measure: {"median": median[column], "p10": low[column], "p90": high[column]}
        for column, measure in enumerate(MEASURES)
    }


class Timed:
    """A model's three programs, compiled, with their inputs.

    Attributes:
        compile_seconds: tracing and compiling, of all three.
        bytes: `weights` as stored and `weights_resident` in the compute dtype; `kv` of the allocated cache and
            `kv_formula` for its capacity; `decode_peak`, all that the decode program holds by XLA's account.
    """

    def __init__(self, model: Model, shape: Shape, seed: int) -> None:
        self.shape, self.compile_seconds = shape, 0.0
        dtype, what = compute_dtype(), (model.config, model.spec)
        self.params = jax.block_until_ready(cast(model.params, dtype))
        random = np.random.default_rng(seed)
        tokens = jnp.asarray(random.integers(4, model.config.vocab_size, (shape.batch, shape.prompt), np.int32))
        lengths = jnp.full(shape.batch, shape.prompt, jnp.int32)
        self.questions = tokens, lengths, jnp.tile(jnp.array([4, 5], jnp.int32), (shape.batch, 1))
        self.prompts = tokens, jnp.ones(tokens.shape, bool), jax.random.split(jax.random.key(seed), shape.batch)
        self.rule = Sampling.checked(), jnp.int32(NEVER)
        self.until = jnp.int32(shape.prompt + shape.new_tokens)
        capacity = bucket(shape.prompt + shape.new_tokens + 1)

        @jax.jit
        def score(params: Params, tokens: Array, lengths: Array, answers: Array) -> Any:
            return target_logprobs(*what, dtype, params, Questions(tokens, lengths, lengths, answers))

        self.score = self._compiled(score, self.params, *self.questions)
        start = partial(self._compiled, prefill, *what, self.params, *self.prompts, *self.rule)
        self.prefill = start(capacity=capacity, dtype=dtype)
        state = self.prefill(self.params, *self.prompts, *self.rule)
        self.decode = self._compiled(decode, *what, self.params, state, self.until, *self.rule, dtype=dtype)

        memory = self.decode.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        self.bytes = {
            "weights": model.nbytes,
            "weights_resident": sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)),
            "kv": state.cache.nbytes,
            "kv_formula": shape.batch * (capacity * bytes_per_token(model.spec) + bytes_per_sequence(model.spec)),
            "decode_peak": peak - memory.alias_size_in_bytes,
        }

    def _compiled(self, function: Any, *args: Any, **static: Any) -> Any:
        began = time.perf_counter()
        program = function.lower(*args, **static).compile()
        self.compile_seconds += time.perf_counter() - began
        return program

    def round(self) -> list[float]:
        """Run each program once; milliseconds in the order and units of `MEASURES`."""
        scoring, _ = _clock(lambda: self.score(self.params, *self.questions))
        prefilling, state = _clock(lambda: self.prefill(self.params, *self.prompts, *self.rule))
        decoding, _ = _clock(lambda: self.decode(self.params, state, self.until, *self.rule))
        return [scoring / self.shape.batch, prefilling, decoding / self.shape.new_tokens]


def _clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds until all of the result is there, and the result."""
    began = time.perf_counter()
    result = jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - began), result
