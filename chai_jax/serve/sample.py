"""How the next token is chosen from its logits: greedy, temperature, top-k, top-p."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

from chai_jax.errors import InputError


@partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_p"], meta_fields=["top_k"])
@dataclass(frozen=True)
class Sampling:
    """Greedy unless there is a temperature. Only another `top_k` (or one more or less of the three) is compiled anew.

    Attributes:
        temperature: divides the logits; None is greedy.
        top_k: only the k likeliest tokens.
        top_p: of these, only the nucleus (see `nucleus`).
    """

    temperature: Any = None  # a number, or float [] when traced
    top_k: int | None = None
    top_p: Any = None  # likewise

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
        return cls(temperature, top_k, top_p)


def nucleus(logits: Float[Array, "*batch V"], top_p: float | Float[Array, ""]) -> Bool[Array, "*batch V"]:
    """The smallest set of likeliest tokens that holds at least `top_p` of the probability.

    `logits` must fall along each row. Holtzman et al. 2019 (arXiv 1904.09751), section 3.1.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.cumsum(probabilities, axis=-1) - probabilities < top_p


def chances(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """The distribution that `sample` draws from, as log-probabilities (-inf: never drawn); greedy: all on one token.

    Temperature first, then top-k, then top-p, as in transformers.
    """
    vocabulary = logits.shape[-1]
    if sampling.temperature is None:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(vocabulary) == best, 0.0, -jnp.inf)
    # Relative to the peak, a tiny temperature gives -inf and never inf - inf.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None:
        kept, ids = jax.lax.top_k(scaled, min(sampling.top_k or vocabulary, vocabulary))
        if sampling.top_p is not None:
            kept = jnp.where(nucleus(kept, sampling.top_p), kept, -jnp.inf)
        scaled = jnp.put_along_axis(jnp.full_like(scaled, -jnp.inf), ids, kept, axis=-1, inplace=False)
    return jax.nn.log_softmax(scaled, axis=-1)


def sample(logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling) -> Int32[Array, "B"]:
    """One token per row, by `chances`.

    Each row has its own key, so that what is drawn for it depends on no other row.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, chances(logits, sampling)).astype(jnp.int32)
