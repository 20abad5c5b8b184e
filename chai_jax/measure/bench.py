"""Latency of several models side by side: warmed up, interleaved, medians with their spread, compilation apart."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.model.model import Model, compute_dtype
from chai_jax.progress import track
from chai_jax.score import Questions, target_logprobs
from chai_jax.serve.generate import NEVER, cast, decode, prefill
from chai_jax.serve.sample import Sampling

Record = dict[str, Any]
MEASURES = ("score_ms_per_example", "prefill_ms", "decode_ms_per_token")


@dataclass(frozen=True)
class Shape:
    """What is timed: a batch of prompts of equal length, continued by `new_tokens` each, and the same batch scored."""

    batch: int = 8
    prompt: int = 32
    new_tokens: int = 32

    def fit(self, positions: int) -> "Shape":
        """The same where it fits the position table, else halves of what there is."""
        if self.prompt + self.new_tokens <= positions:
            return self
        return Shape(self.batch, positions // 2, positions - positions // 2)


def latency(models: Mapping[str, Model], shape: Shape | None = None, trials: int = 9, seed: int = 0) -> dict[str, Record]:
    """Time scoring, prefill and decoding of every model, in turn within each of `trials` rounds.

    Returns:
        Per model: for each of `MEASURES` the median, p10 and p90 in milliseconds and the ratio to the first model
        (median and p10, p90 of the ratios round by round), `compile_seconds`, and the shape, trials, device and dtype.
    """
    first = next(iter(models.values()))
    shape = (shape or Shape()).fit(min(model.config.max_positions for model in models.values()))
    tokens = np.random.default_rng(seed).integers(4, first.config.vocab_size, (shape.batch, shape.prompt), np.int32)
    programs, compiled = {}, {}
    for name, model in track(list(models.items()), "compiling", total=len(models)):
        began = time.perf_counter()
        programs[name] = _programs(model, tokens, shape)
        for program in programs[name].values():
            program()
        compiled[name] = time.perf_counter() - began
    rounds: dict[str, dict[str, list[float]]] = {name: {measure: [] for measure in MEASURES} for name in models}
    for _ in track(range(trials), "timing"):
        for name, measures in programs.items():
            for measure, program in measures.items():
                rounds[name][measure].append(program())
    base = next(iter(rounds.values()))
    common = {"n": trials, **vars(shape), "device": jax.devices()[0].device_kind, "dtype": np.dtype(compute_dtype()).name}
    return {
        name: {
            **{measure: _spread(np.array(times)) for measure, times in found.items()},
            "ratio_to_first": {m: _spread(np.array(found[m]) / np.array(base[m])) for m in MEASURES},
            "compile_seconds": round(compiled[name], 3),
            **common,
        }
        for name, found in rounds.items()
    }


def _spread(times: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def _programs(model: Model, tokens: np.ndarray, shape: Shape) -> dict[str, Callable[[], float]]:
    """For each measure a function that runs it once and returns milliseconds (per example, per batch, per token)."""
    dtype = compute_dtype()
    params = jax.block_until_ready(cast(model.params, dtype))
    mask = np.ones(tokens.shape, bool)
    keys = jax.random.split(jax.random.key(0), shape.batch)
    eos, greedy = jnp.int32(NEVER), Sampling.checked()
    capacity = shape.prompt + shape.new_tokens
    lengths = jnp.full(shape.batch, shape.prompt, jnp.int32)
    questions = Questions(jnp.asarray(tokens), lengths, lengths, jnp.full((shape.batch, 1), 4, jnp.int32))

    def start() -> Any:
        return prefill(model.config, model.spec, params, tokens, mask, keys, greedy, eos, capacity=capacity, dtype=dtype)

    def timed(run: Callable[[], Any], per: float) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run())
        return 1e3 * (time.perf_counter() - began) / per

    def decoding() -> float:
        state = jax.block_until_ready(start())
        until = jnp.int32(capacity - 1)
        steps = shape.new_tokens - 1
        return timed(
            lambda: decode(model.config, model.spec, params, state, until, greedy, eos, dtype=dtype).tokens, steps
        )

    return {
        "score_ms_per_example": lambda: timed(
            lambda: target_logprobs(model.config, model.spec, dtype, params, questions), shape.batch
        ),
        "prefill_ms": lambda: timed(lambda: start().tokens, 1),
        "decode_ms_per_token": decoding,
    }
