"""Text from prompts: one compiled prefill, then one compiled loop over tokens with the cache as its carry.

Prompts of a batch are padded on the left, so that the last column is every sequence's newest token, in prefill as in
decoding. Batch, prompt length and capacity are rounded up to a few sizes, so that mixed requests seldom recompile.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, UInt32

from chai_jax.errors import InputError
from chai_jax.model.cache import Cache, extend
from chai_jax.model.model import Model, compute_dtype
from chai_jax.model.opt import forward, unembed
from chai_jax.model.params import OPTConfig, Params
from chai_jax.model.quantized import Leaf, Quantized, dequantize, is_leaf
from chai_jax.model.sharding import Layout, current_layout, whole
from chai_jax.progress import track
from chai_jax.serve.sample import Sampling, sample
from chai_jax.spec import Spec

NEVER = -1  # as the token to stop at
STREAM_TOKENS = 8  # tokens decoded between two pieces of streamed text


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "tokens", "done", "keys"], meta_fields=[])
@dataclass(frozen=True)
class State:
    """Decoding between two steps.

    Attributes:
        cache: of all columns but the newest.
        tokens: column by column what the cache holds, then the newest token (at column `cache.length`), then padding.
        done: sequences that have stopped, or are there to fill the batch.
        keys: for each sequence's next draw.
    """

    cache: Cache
    tokens: Any  # int32 [B, S]
    done: Any  # bool [B]
    keys: Any  # random keys [B]


def bucket(count: int) -> int:
    """`count` rounded up by at most a quarter (or to a multiple of 16): 24 sizes up to 2,048."""
    step = max(16, 1 << max((count - 1).bit_length() - 3, 0))
    return -(-count // step) * step


def cast(params: Params, dtype: Any, expand: bool | None = None) -> Params:
    """Matrices and embeddings in the dtype they are multiplied in, once instead of at every token.

    Vectors (norms, biases) are cast where they are used. What is quantized is expanded on CPUs alone (if `expand` does
    not say otherwise): accelerators read it faster.
    """
    expand = jax.default_backend() == "cpu" if expand is None else expand

    def leaf(x: Leaf) -> Leaf:
        if isinstance(x, Quantized):
            return dequantize(x, dtype) if expand else x
        return x.astype(dtype) if x.ndim > 1 else x

    return jax.tree.map(leaf, params, is_leaf=is_leaf)


def _choose(
    config: OPTConfig, params: Params, hidden: Float[Array, "B T D"], state: State, sampling: Sampling, eos: Array
) -> State:
    """Write the next token of every sequence behind the columns that the cache holds."""
    keys = jax.vmap(jax.random.split)(state.keys)
    chosen = sample(unembed(config, params, hidden[:, -1]), keys[:, 1], sampling)
    chosen = jnp.where(state.done, config.pad_token_id, chosen)
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.cache.length, axis=1)
    return State(state.cache, tokens, state.done | (chosen == eos), keys[:, 0])


@partial(jax.jit, static_argnames=("config", "spec", "dtype", "capacity", "layout"))
def prefill(
    config: OPTConfig,
    spec: Spec,
    params: Params,
    tokens: Int32[Array, "B T"],
    mask: Bool[Array, "B T"],
    keys: Key[Array, "B"],
    sampling: Sampling,
    eos: Int32[Array, ""],
    *,
    capacity: int,
    dtype: Any,
    layout: Layout | None = None,
) -> State:
    """Read left-padded prompts and choose each sequence's first token; rows without any token are done at once.

    Args:
        capacity: columns to make room for, prompt and new tokens together.
        eos: token to stop at, or `NEVER`.
        layout: by which to split the cache, if any.
    """
    output = forward(config, spec, params, tokens, mask, dtype=dtype)
    room = capacity - tokens.shape[1]
    columns = jnp.pad(tokens, ((0, 0), (0, room)), constant_values=config.pad_token_id)
    cache = extend(output.cache, capacity)
    if layout is not None:
        cache = dataclasses.replace(cache, layers=layout.cache(cache.layers))
    state = State(cache, columns, ~mask.any(axis=1), keys)
    return _choose(config, params, output.hidden, state, sampling, eos)


@partial(jax.jit, static_argnames=("config", "spec", "dtype"), donate_argnames="state")
def decode(
    config: OPTConfig,
    spec: Spec,
    params: Params,
    state: State,
    until: Int32[Array, ""],
    sampling: Sampling,
    eos: Int32[Array, ""],
    *,
    dtype: Any,
) -> State:
    """Token after token until the cache holds `until` columns or all sequences are done; `state` is used up.

    One program serves a whole completion and the small pieces of a stream.
    """

    def step(state: State) -> State:
        newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.cache.length, 1, axis=1)
        output = forward(config, spec, params, newest, ~state.done[:, None], cache=state.cache, dtype=dtype)
        after = State(output.cache, state.tokens, state.done, state.keys)
        return _choose(config, params, output.hidden, after, sampling, eos)

    return jax.lax.while_loop(lambda state: (state.cache.length < until) & ~state.done.all(), step, state)


def pad_left(prompts: Sequence[Sequence[int]], pad: int, ways: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [B, T] and mask bool [B, T] of ragged prompts; B and T are rounded up.

    From `ways` rows on B is a multiple of it, so that the batch can be split; fewer rows are not worth splitting.
    """
    rows, columns = 1 << (len(prompts) - 1).bit_length(), bucket(max(map(len, prompts)))
    rows = rows if rows < ways else -(-rows // ways) * ways
    tokens, mask = np.full((rows, columns), pad, np.int32), np.zeros((rows, columns), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, columns - len(prompt) :] = prompt
        mask[row, columns - len(prompt) :] = True
    return tokens, mask


@dataclass(frozen=True)
class Request:
    """What is wanted of every prompt; `eos` ends a sequence (`NEVER` ends none)."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos: int


def _continue(
    model: Model,
    params: Params,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    request: Request,
    piece: int,
) -> Iterator[list[list[int]]]:
    """What one batch has been continued by so far: after its first token, then each time `piece` more are there.

    Args:
        params: the model's, placed and `cast`.
        numbers: of the prompts among all that were asked for; they and the seed decide what is drawn.
    """
    dtype, eos = compute_dtype(), jnp.int32(request.eos)
    tokens, mask = pad_left(prompts, model.config.pad_token_id, layout.ways)
    rows, start = tokens.shape
    filled = np.array([*numbers, *[0] * (rows - len(prompts))], np.uint32)
    capacity = bucket(start + request.max_new_tokens)
    program = partial(prefill, model.config, model.spec, params, capacity=capacity, dtype=dtype, layout=layout)
    tokens, mask, filled = layout.rows((tokens, mask, filled))
    state = program(tokens, mask, _keys(jnp.uint32(request.seed), filled), request.sampling, eos)
    made = 1
    while True:
        columns, done = whole((state.tokens, state.done))
        new = columns[: len(prompts), start : start + made].tolist()
        yield [row[: row.index(request.eos) + 1] if request.eos in row else row for row in new]
        if made == request.max_new_tokens or done.all():
            return
        made = min(made + piece, request.max_new_tokens)
        until = jnp.int32(start + made - 1)
        state = decode(model.config, model.spec, params, state, until, request.sampling, eos, dtype=dtype)


@jax.jit
def _keys(seed: UInt32[Array, ""], numbers: UInt32[Array, "B"]) -> Key[Array, "B"]:
    """For each prompt's number a random key that follows from it and the seed alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)


def _check(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise InputError unless every prompt and its new tokens fit the model."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} has no tokens; expected at least one: begin it with the model's </s>")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise InputError(
                f"prompt {number} has tokens outside 0 to {model.config.vocab_size - 1}: use the model's tokenizer"
            )
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; {max_new_tokens} new ones do not fit the model's "
                f"{model.config.max_positions} positions: shorten the prompt or lower max_new_tokens"
            )


def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: bool = True,
    batch_size: int = 16,
) -> list[list[int]]:
    """The tokens that follow each prompt (token ids, the model's `</s>` first): at most `max_new_tokens`.

    With `stop`, a sequence ends with the model's end-of-text token where it comes to one. Prompts of similar length
    go through the model together, `batch_size` at a time; what is drawn for a prompt depends on its number alone.

    Raises:
        InputError: a prompt that with `max_new_tokens` does not fit the position table, that is empty or not of the
            model's tokens; settings out of range (see `Sampling.checked`).
    """
    _check(model, prompts, max_new_tokens)
    eos = model.config.eos_token_id if stop else NEVER
    request = Request(max_new_tokens, Sampling.checked(temperature, top_k, top_p), seed, eos)
    layout = current_layout()
    params = cast(layout.params(model.config, model.spec, model.params), compute_dtype())
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    completions: list[list[int]] = [[] for _ in prompts]
    for numbers in track(batches, "generating"):
        batch = [prompts[number] for number in numbers]
        *_, made = _continue(model, params, layout, batch, numbers, request, piece=max_new_tokens)
        for number, tokens in zip(numbers, made, strict=True):
            completions[number] = tokens
    return completions


def encode_prompt(model: Model, prompt: str) -> list[int]:
    """`</s>`, unless the prompt begins with its own, and the prompt's tokens.

    Raises:
        InputError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise InputError(
            "the model has no tokenizer; expected one: load it with its tokenizer files, or use generate_tokens"
        )
    tokens = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    bos = model.config.bos_token_id
    return tokens if tokens[:1] == [bos] else [bos, *tokens]


def generate(
    model: Model,
    prompts: Sequence[str],
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    on_text: Callable[[str], object] | None = None,
) -> list[str]:
    """The text that follows each prompt, without the prompt and without `</s>`; an empty prompt is a fresh text.

    Args:
        temperature: 0 is greedy; `top_k` and `top_p` as in `Sampling`.
        on_text: for a single prompt, called with each piece of the text as it is decoded (see `stream`).

    Raises:
        InputError: as `generate_tokens`; also a model without a tokenizer, one string in place of a list, and `on_text`
            with more than one prompt.
    """
    if isinstance(prompts, str):
        raise InputError("prompts is one string; expected a list of strings: write [prompt]")
    if on_text is not None:
        if len(prompts) != 1:
            raise InputError(
                f"on_text with {len(prompts)} prompts; expected one: texts of a batch are made side by side"
            )
        pieces = []
        for piece in stream(model, prompts[0], max_new_tokens, temperature, top_k, top_p, seed):
            on_text(piece)
            pieces.append(piece)
        return ["".join(pieces)]
    encoded = [encode_prompt(model, prompt) for prompt in prompts]
    made = generate_tokens(model, encoded, max_new_tokens, temperature, top_k, top_p, seed, batch_size=batch_size)
    return [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]


def stream(
    model: Model,
    prompt: str,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """`generate(model, [prompt], ...)[0]` in pieces, as they are decoded; a character comes when its last byte has.

    Raises as `generate` does, at the first piece.
    """
    encoded = [encode_prompt(model, prompt)]
    _check(model, encoded, max_new_tokens)
    request = Request(max_new_tokens, Sampling.checked(temperature, top_k, top_p), seed, model.config.eos_token_id)
    layout = current_layout()
    params = cast(layout.params(model.config, model.spec, model.params), compute_dtype())
    shown = text = ""
    for (tokens,) in _continue(model, params, layout, encoded, [0], request, piece=STREAM_TOKENS):
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        whole = text.rstrip("\ufffd")
        if whole.startswith(shown) and whole != shown:
            yield whole[len(shown) :]
            shown = whole
    if text != shown:
        yield text[len(shown) :]
