"""How the next token is chosen from its logits: greedy, temperature, top-k, top-p."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key

from chai_jax.errors import InputError

GREEDY, ALL, WHOLE = np.float32(0), np.int32(np.iinfo(np.int32).max), np.float32(1)  # no temperature, no limits
FARTHEST = np.float32(np.inf).view(np.int32).item()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Greedy unless there is a temperature. All of it is data: no request is compiled anew for what it asks.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k likeliest tokens, and those as likely as the last of them; `ALL` for no limit.
        top_p: of these, only the nucleus (see `nucleus`); 1 for no limit.
    """

    temperature: Any = GREEDY  # float32 []
    top_k: Any = ALL  # int32 []
    top_p: Any = WHOLE  # float32 []

    @classmethod
    def checked(cls, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None) -> "Sampling":
        """From what a person asks for, where temperature 0 is greedy.

        Raises:
            InputError: a value out of range, or `top_k` or `top_p` for greedy decoding, where they do nothing.
        """
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise InputError(f"temperature is {temperature}; expected 0 (greedy) or a positive number, such as 0.8")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is {top_k}; expected at least 1, or none for the whole vocabulary")
        if top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}; expected a number above 0 and at most 1, such as 0.9")
        if temperature == 0:
            if top_k is not None or top_p is not None:
                raise InputError("top_k and top_p do nothing at temperature 0 (greedy); give a temperature, such as 1")
            return cls()
        limit = ALL if top_k is None else np.int32(min(top_k, int(ALL)))
        # A number that float32 rounds to 0 would be greedy: nearly the same.
        return cls(np.float32(temperature), limit, WHOLE if top_p is None else np.float32(top_p))


def likeliest(
    logits: Float[Array, "*batch V"], weights: Float[Array, "*batch V"], enough: Float[Array, ""]
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


def nucleus(logits: Float[Array, "*batch V"], top_p: float | Float[Array, ""]) -> Bool[Array, "*batch V"]:
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
    temperature, top_k, top_p = map(jnp.asarray, (sampling.temperature, sampling.top_k, sampling.top_p))

    def greedy(logits: Array) -> Array:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(vocabulary) == best, 0.0, -jnp.inf)

    def limited(scaled: Array) -> Array:
        of_k = likeliest(scaled, jnp.ones_like(scaled), top_k.astype(jnp.float32))
        scaled = jnp.where(of_k, scaled, -jnp.inf)
        return jnp.where(nucleus(scaled, top_p), scaled, -jnp.inf)

    def tempered(logits: Array) -> Array:
        # Relative to the peak, a tiny temperature gives -inf and never inf - inf.
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
        some = (top_k < vocabulary) | (top_p < 1)
        return jax.nn.log_softmax(jax.lax.cond(some, limited, lambda scaled: scaled, scaled), axis=-1)

    return jax.lax.cond(temperature == 0, greedy, tempered, logits)


def sample(logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling) -> Int32[Array, "B"]:
    """One token per row, by `chances`.

    Each row has its own key, so that what is drawn for it depends on no other row.
    """

    def best(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(logits: Array) -> Array:
        return jax.vmap(jax.random.categorical)(keys, chances(logits, sampling)).astype(jnp.int32)

    return jax.lax.cond(jnp.asarray(sampling.temperature) == 0, best, drawn, logits)
