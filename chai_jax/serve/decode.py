"""Two programs that make tokens: one reads the prompts, one loops over new tokens with the cache as its carry.

Every sequence begins at column 0 and has a length of its own. Batch, prompt length and capacity are rounded up to a few
sizes, so that mixed requests seldom recompile.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key

from chai_jax.model.by_row import put_rows, slice_rows
from chai_jax.model.cache import Cache, extend
from chai_jax.model.decoder import Output, forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params, fold_projections
from chai_jax.model.quantized import Leaf, Quantized, QuantizedArray, dequantize, is_leaf
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.score.questions import most_rows
from chai_jax.serve.sample import Sampling, sample

NEVER = -1  # as a token to stop at


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "tokens", "done", "keys", "made"], meta_fields=[])
@dataclass(frozen=True)
class Decoding:
    """A batch between two steps of decoding.

    Attributes:
        cache: of all tokens but the newest.
        tokens: column by column what the cache holds, then the newest token (at column `cache.length`), then padding.
        done: sequences that have stopped, or are there to fill the batch.
        keys: for each sequence's next draw.
        made: tokens since the prompts, of those that have not stopped.
    """

    cache: Cache
    tokens: Any  # int32 [B, S]
    done: Any  # bool [B]
    keys: Any  # random keys [B]
    made: Any  # int32 []


def bucket(count: int) -> int:
    """`count` rounded up by at most a quarter (or to a multiple of 16): 24 sizes up to 2,048."""
    step = max(16, 1 << max((count - 1).bit_length() - 3, 0))
    return -(-count // step) * step


def expands(weights: type[Quantized], how: Execution) -> bool:
    """Whether weights of this kind are expanded to the activations' dtype once, before the first token.

    They are on CPUs, where XLA's products of int8 are slower than those of float32, except where kernels read int8 as
    it is, a quarter of float32's bytes. With bfloat16 they are expanded all the same: it is as fast, and prompts are
    read faster. Accelerators read what is stored.
    """
    read = weights is QuantizedArray and how.dtype == jnp.float32 and how.kernels == "native"
    return how.layout.platform == "cpu" and not read


def cast(params: Params, how: Execution) -> Params:
    """Matrices and embeddings in the dtype they are multiplied in, once instead of at every token.

    Vectors (norms, biases) are cast where they are used. What is quantized is expanded where that is faster
    (`expands`).
    """

    def leaf(x: Leaf) -> Leaf:
        if isinstance(x, Quantized):
            return dequantize(x, how.dtype) if expands(type(x), how) else x
        return x.astype(how.dtype) if x.ndim > 1 else x

    return jax.tree.map(leaf, params, is_leaf=is_leaf)


_serving: WeakKeyDictionary[Model, tuple[Execution, Params]] = WeakKeyDictionary()


def serving_params(model: Model, how: Execution) -> Params:
    """A model's parameters as the programs below multiply them: placed, `cast`, and folded on one device.

    They are kept for as long as the model is, beside it: a request must not pay for them again.
    """
    kept = _serving.get(model)
    if kept is None or kept[0] != how:
        params = cast(how.layout.params(model.config, model.spec, model.params), how)
        kept = _serving[model] = how, fold_projections(params) if how.layout.mesh.size == 1 else params
    return kept[1]


def _choose(
    config: Architecture,
    params: Params,
    hidden: Float[Array, "B T D"],
    state: Decoding,
    sampling: Sampling,
    eos: Array,
    how: Execution,
) -> Decoding:
    """Write the next token of every sequence that goes on behind the columns that its cache holds."""
    keys = jax.vmap(jax.random.split)(state.keys)
    chosen = sample(unembed(config, params, hidden[:, -1], how), keys[:, 1], sampling)
    length = state.cache.length
    chosen = jnp.where(state.done, slice_rows(state.tokens, length, 1, axis=1)[:, 0], chosen)
    tokens = put_rows(state.tokens, chosen[:, None], length, axis=1)
    return Decoding(state.cache, tokens, state.done | jnp.isin(chosen, eos), keys[:, 0], state.made + 1)


def _read(config: Architecture, spec: Spec, params: Params, tokens: Array, mask: Array, how: Execution) -> Output:
    """`forward` over prompts: of their hidden states, the last ones.

    A CPU that has all of them reads as many at once as fit its caches; other devices, and many, read all.
    """
    batch, columns = tokens.shape
    rows = batch
    if how.layout.platform == "cpu" and how.layout.mesh.size == 1:
        rows = next(rows for rows in range(min(batch, most_rows(columns)), 0, -1) if batch % rows == 0)

    def some(prompts: tuple[Array, Array]) -> Output:
        newest = jnp.maximum(prompts[1].sum(axis=1, keepdims=True, dtype=jnp.int32) - 1, 0)
        return forward(config, spec, params, *prompts, how, wanted=newest)

    if rows == batch:
        return some((tokens, mask))
    parts = jax.lax.map(some, jax.tree.map(lambda x: x.reshape(-1, rows, columns), (tokens, mask)))
    joined: Output = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), parts)
    return joined


@partial(jax.jit, static_argnames=("config", "spec", "capacity", "how"))
def prefill(
    config: Architecture,
    spec: Spec,
    params: Params,
    tokens: Int32[Array, "B T"],
    mask: Bool[Array, "B T"],
    keys: Key[Array, "B"],
    sampling: Sampling,
    eos: Int32[Array, "*E"],
    *,
    capacity: int,
    how: Execution,
) -> Decoding:
    """Read prompts, padded on the right, and choose each one's first token; rows without any token are done at once.

    Args:
        capacity: columns to make room for, prompt and new tokens together.
        eos: token or tokens to stop at; `NEVER` is none.
        how: its layout splits the cache.
    """
    output = _read(config, spec, params, tokens, mask, how)
    room = capacity - tokens.shape[1]
    columns = jnp.pad(tokens, ((0, 0), (0, room)), constant_values=config.pad_token_id)
    cache = extend(output.cache, capacity)
    cache = dataclasses.replace(cache, layers=how.layout.cache(cache.layers))
    state = Decoding(cache, columns, ~mask.any(axis=1), keys, jnp.zeros((), jnp.int32))
    return _choose(config, params, output.hidden, state, sampling, eos, how)


@partial(jax.jit, static_argnames=("config", "spec", "how"), donate_argnames="state")
def decode(
    config: Architecture,
    spec: Spec,
    params: Params,
    state: Decoding,
    until: Int32[Array, ""],
    sampling: Sampling,
    eos: Int32[Array, "*E"],
    *,
    how: Execution,
) -> Decoding:
    """Token after token until `until` of them are made or all sequences are done; `state` is used up.

    One program serves a whole completion and the small pieces of a stream.
    """

    def step(state: Decoding) -> Decoding:
        newest = slice_rows(state.tokens, state.cache.length, 1, axis=1)
        output = forward(config, spec, params, newest, ~state.done[:, None], how, cache=state.cache)
        after = dataclasses.replace(state, cache=output.cache)
        return _choose(config, params, output.hidden, after, sampling, eos, how)

    return jax.lax.while_loop(lambda state: (state.made < until) & ~state.done.all(), step, state)


def pad_right(prompts: Sequence[Sequence[int]], pad: int, ways: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [B, T] and mask bool [B, T] of ragged prompts; B and T are rounded up.

    From `ways` rows on B is a multiple of it, so that the batch can be split; fewer rows are not worth splitting.
    """
    rows, columns = 1 << (len(prompts) - 1).bit_length(), bucket(max(map(len, prompts)))
    rows = rows if rows < ways else -(-rows // ways) * ways
    tokens, mask = np.full((rows, columns), pad, np.int32), np.zeros((rows, columns), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = True
    return tokens, mask
