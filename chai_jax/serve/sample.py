"""How the next token is chosen from its logits: greedy, temperature, top-k, top-p."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key

from chai_jax.errors import InputError

ALL = np.iinfo(np.int32).max  # as top_k: no limit
FARTHEST = np.float32(np.inf).view(np.int32).item()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Greedy, or drawn by three numbers, which are data: there are two kinds of programs, whatever requests ask.

    Attributes:
        temperature: divides the logits; None, as all three then are, is greedy.
        top_k: only the k likeliest tokens, and those as likely as the last of them; `ALL` for no limit.
        top_p: of these, only the nucleus (see `nucleus`); 1 for no limit.
    """

    temperature: Any = None  # float32 [], or [B] where each row has its own
    top_k: Any = None  # int32, likewise
    top_p: Any = None  # float32, likewise

    @classmethod
    def checked(cls, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None) -> "Sampling":
        """From what a person asks for, where temperature 0 is greedy.

        No limit are None, `top_k` 0 or -1 (other libraries' words for it) and `top_p` 1.

        Raises:
            InputError: a value out of range, or `top_k` or `top_p` for greedy decoding, where they do nothing.
        """
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise InputError(f"temperature is {temperature}; expected 0 (greedy) or a positive number, such as 0.8")
        if top_k is not None and top_k < -1:
            raise InputError(f"top_k is {top_k}; expected at least 1, or 0 (or none) for the whole vocabulary")
        if top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}; expected a number above 0 and at most 1, such as 0.9")
        top_k, top_p = None if top_k in (0, -1) else top_k, None if top_p == 1 else top_p
        if temperature == 0:
            if top_k is not None or top_p is not None:
                raise InputError("top_k and top_p do nothing at temperature 0 (greedy); give a temperature, such as 1")
            return cls()
        limit = np.int32(ALL if top_k is None else min(top_k, ALL))
        # No temperature is so low that float32 makes it 0.
        lowest = float(np.finfo(np.float32).tiny)
        return cls(np.float32(max(temperature, lowest)), limit, np.float32(1 if top_p is None else top_p))


def likeliest(
    logits: Float[Array, "*batch V"], weights: Float[Array, "*batch V"], enough: Float[Array, "..."]
) -> Bool[Array, "*batch V"]:
    """The fewest likeliest tokens whose weights add up to `enough`, and those as likely as the last of them.

    Found by halving the range of distances to the peak, which floats of one sign keep as integers: 31 sums, no sort.
    """
    below = jnp.abs(logits - logits.max(axis=-1, keepdims=True)).astype(jnp.float32)
    distance = jax.lax.bitcast_convert_type(below, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        reached = jnp.where(distance <= middle, weights, 0.0).sum(axis=-1, keepdims=True) >= enough
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    low = jnp.zeros_like(distance[..., :1])
    return distance <= jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, FARTHEST)))[1]


def nucleus(logits: Float[Array, "*batch V"], top_p: float | Float[Array, "..."]) -> Bool[Array, "*batch V"]:
    """The fewest likeliest tokens that hold `top_p` of the probability, and those as likely as the last; all at 1.

    Holtzman et al. 2019 (arXiv 1904.09751), section 3.1.
    """
    enough = jnp.asarray(top_p, jnp.float32)
    return likeliest(logits, jax.nn.softmax(logits, axis=-1), enough) | (enough >= 1)


def chances(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """The distribution that `sample` draws from, as log-probabilities (-inf: never drawn); greedy: all on one token.

    Temperature first, then top-k, then top-p, as in transformers.
    """
    vocabulary = logits.shape[-1]
    if sampling.temperature is None:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(vocabulary) == best, 0.0, -jnp.inf)
    # [1], or [B, 1] where each row has its own.
    temperature, top_k, top_p = (
        jnp.asarray(each)[..., None] for each in (sampling.temperature, sampling.top_k, sampling.top_p)
    )

    def limited(scaled: Array) -> Array:
        of_k = likeliest(scaled, jnp.ones_like(scaled), top_k.astype(jnp.float32))
        scaled = jnp.where(of_k, scaled, -jnp.inf)
        return jnp.where(nucleus(scaled, top_p), scaled, -jnp.inf)

    # Relative to the peak, a tiny temperature gives -inf and never inf - inf.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    some = ((top_k < vocabulary) | (top_p < 1)).any()
    return jax.nn.log_softmax(jax.lax.cond(some, limited, lambda scaled: scaled, scaled), axis=-1)


def sample(logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling) -> Int32[Array, "B"]:
    """One token per row, by `chances`.

    Each row has its own key, so that what is drawn for it depends on no other row.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, chances(logits, sampling)).astype(jnp.int32)


def sample_rows(logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling) -> Int32[Array, "B"]:
    """As `sample`, each row by its own numbers, all of them [B]; rows of temperature 0 are greedy."""
    greedy, drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32), sampling.temperature > 0

    def draw() -> Array:
        warm = jnp.where(drawn, sampling.temperature, 1.0)
        return jnp.where(drawn, sample(logits, keys, dataclasses.replace(sampling, temperature=warm)), greedy)

    return jax.lax.cond(drawn.any(), draw, lambda: greedy)
