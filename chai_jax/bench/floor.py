"""The least time a measured program could take on this very machine: what it must move and multiply, at probed rates.

Roofline (Williams et al. 2009, CACM 52:4): ms = 1000 max(bytes / bandwidth, FLOPs / rate). Bytes are the weights as
they lie in memory, each once, and the keys and values that hold tokens, scales included; FLOPs those of products
(`chai_jax.model.flops`). Activations, padding and all else are left out, so this is a floor. With B sequences of P
prompt tokens, N decoding steps, Q tokens of a question, k cache bytes a token, and per token t, per pair of tokens p
and per predicted token h FLOPs:

    one decoding step   weights + B (k (P + (N + 1) / 2) + cache per sequence)    B (t + p (P + (N + 1) / 2) + h)
    prefill             weights + B (k P + cache per sequence)                    B (t P + p P (P + 1) / 2 - s + h)
    scoring B questions weights                                                   B (t Q + p Q (Q + 1) / 2 - s + h)

where s are the FLOPs that the last layer saves: of all tokens but the last one it computes only keys and values
(`chai_jax.model.flops.spared`). The step is the mean one: step i reads or writes P + i columns; of a layer with a
window, and of its pairs, no more than the window's. Of an embedding that is looked up, not multiplied, the rows that
are read count. Weights that fit into the processor's caches can be read faster than memory gives them: a tiny model may
be faster than its floor.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.bench.race import Shape
from chai_jax.model.cache import bytes_per_sequence, bytes_per_token, group_bytes_per_token
from chai_jax.model.flops import count_flops, spared
from chai_jax.model.model import Model
from chai_jax.serve.decode import cast


@dataclass(frozen=True)
class Rates:
    """What one device was seen to reach: bytes a second read from memory, and FLOPs a second, both in `dtype`."""

    bytes_per_second: float
    flops_per_second: float
    dtype: str

    def best(self, other: "Rates") -> "Rates":
        """The better of each of two probes."""
        bytes_, flops = self.bytes_per_second, self.flops_per_second
        return Rates(max(bytes_, other.bytes_per_second), max(flops, other.flops_per_second), self.dtype)

    @classmethod
    def typical(cls, probes: Sequence["Rates"]) -> "Rates":
        """The medians of some probes."""
        bytes_, flops = (
            statistics.median(getattr(each, name) for each in probes)
            for name in ("bytes_per_second", "flops_per_second")
        )
        return cls(bytes_, flops, probes[0].dtype)


def probe_rates(dtype: Any, sides: tuple[int, int] | None = None, seconds: float = 1.0) -> Rates:
    """The best rates of a short probe of the first device: those of the machine when nothing else disturbs it.

    Bytes are read by a square matrix times a vector, or by the matrix's sum, whichever is faster. FLOPs are those of
    the product of two squares, which hold random numbers rounded to float16, as published weights are.

    Args:
        sides: of the two kinds of squares; the first must be too large for any cache. Not given, 8,192 (268 MB of
            float32) and 1,024 on CPUs, four and eight times as much elsewhere.
        seconds: for which each of the three is repeated.
    """
    cpu = jax.default_backend() == "cpu"
    large, small = sides or ((8192, 1024) if cpu else (32768, 8192))
    wide = jnp.ones((large, large), dtype)
    square = jax.random.normal(jax.random.key(0), (small, small), jnp.float16).astype(dtype)
    vector = jnp.ones((large,), dtype)
    times = partial(jax.lax.dot, preferred_element_type=jnp.float32)
    reading = min(_best(times, seconds, wide, vector), _best(jnp.sum, seconds, wide))
    multiplying = _best(times, seconds, square, square)
    return Rates(wide.nbytes / reading, 2 * small**3 / multiplying, np.dtype(dtype).name)


def _best(function: Callable[..., Any], seconds: float, *args: Any) -> float:
    """The shortest time in seconds of a compiled function, repeated for `seconds`, three times at least."""
    program = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(program(*args))
    found: list[float] = []
    while len(found) < 3 or sum(found) < seconds:
        began = time.perf_counter()
        jax.block_until_ready(program(*args))
        found.append(time.perf_counter() - began)
    return min(found)


@dataclass(frozen=True)
class LeastWork:
    """What a program must at least move and multiply."""

    bytes: int | float
    flops: int | float

    def floor(self, rates: Rates) -> dict[str, int | float | str]:
        """`ms` at these rates, by which of the two it is `bound`, and the work."""
        moving, computing = self.bytes / rates.bytes_per_second, self.flops / rates.flops_per_second
        bound = "memory" if moving >= computing else "compute"
        return {"ms": 1e3 * max(moving, computing), "bound": bound, "bytes": self.bytes, "flops": self.flops}


def least_work(model: Model, shape: Shape) -> dict[str, LeastWork]:
    """Of each of `MEASURES` the work that is timed: a question, a prefill of the batch, a step of the batch (see the
    module's text for the formulas)."""
    batch, prompt, question = shape.batch, shape.prompt, shape.question
    row, fixed = bytes_per_token(model.spec), bytes_per_sequence(model.spec)
    flops, less = (count(model.config, model.spec) for count in (count_flops, spared))

    def filled(window: int) -> float:
        """Columns that the mean step reads."""
        return (pairs(prompt + shape.new_tokens, window) - pairs(prompt, window)) / shape.new_tokens

    def weights(tokens: int) -> int:
        return weights_read(model, batch * tokens)

    def forward(tokens: int) -> int | float:
        saved = less.token * (tokens - 1) + less.attention(lambda window: pairs(tokens, window) - one(tokens, window))
        computed = flops.token * tokens + flops.attention(partial(pairs, tokens)) + flops.target
        return batch * (computed - saved)

    columns = sum(
        group_bytes_per_token(group, layer) * filled(layer.window)
        for layer in model.spec.layers
        for group in layer.groups
    )
    return {
        "score_ms_per_example": LeastWork(weights(question) / batch, forward(question) / batch),
        "prefill_ms": LeastWork(weights(prompt) + batch * (row * prompt + fixed), forward(prompt)),
        "decode_ms_per_token": LeastWork(
            weights(1) + batch * (columns + fixed),
            batch * (flops.token + flops.attention(filled) + flops.target),
        ),
    }


def pairs(tokens: int, window: int) -> int:
    """Of a sequence's tokens with themselves and those before them, as far as the window goes; 0: all."""
    near = one(tokens, window)
    return near * (near + 1) // 2 + (tokens - near) * near


def one(tokens: int, window: int) -> int:
    """Of the last token alone."""
    return min(tokens, window or tokens)


def weights_read(model: Model, rows: int) -> int:
    """Bytes of the weights that a pass over `rows` tokens reads, as they are in memory when they are multiplied.

    Whole matrices and vectors; of the positions, and of token embeddings that no head is tied to, one row a token (of
    few tokens: the whole table at most).
    """
    resident = jax.eval_shape(partial(cast, how=model.how), model.params)

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    # Of rotary models there is no table of positions.
    looked_up = [x for name, x in resident["embed"].items() if name == "positions" or not model.config.tied]
    parts = sum(size(table) * min(rows, table.shape[0]) // table.shape[0] for table in looked_up)
    return size(resident) - size(looked_up) + parts
