"""Speculative decoding: a cheap draft proposes tokens, the model checks them all in one pass and keeps what it can.

Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318). A proposal x, drawn from the draft's
distribution q, is kept with probability min(1, p(x) / q(x)), where p is the model's; the first one refused is replaced
by a draw from max(p - q, 0), normalised, and after k that were kept comes one more from p. So every token follows p:
P(x) = q(x) min(1, p(x) / q(x)) + P(refused) max(p - q, 0)(x) / sum max(p - q, 0) = min(q, p) + max(p - q, 0) = p.
Greedy decoding is the same rule with all of p and q on one token each. Of what both caches hold, refused columns are
given up by counting them out: the next tokens are written over them.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

from chai_jax.adapt.distil import check_vocabulary
from chai_jax.errors import InputError
from chai_jax.model.cache import Cache
from chai_jax.model.decoder import forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.sharding import whole
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import BLOCKS
from chai_jax.plans.spec import Spec
from chai_jax.serve.decode import bucket, pad_right, prefill, serving_params
from chai_jax.serve.generate import STREAM_TOKENS, as_text, encode_prompt, keys_of
from chai_jax.serve.request import Request, check_prompts
from chai_jax.serve.sample import Sampling, chances

PROPOSED = 4  # tokens a round, unless told


@dataclass(frozen=True)
class Structure:
    """What of a model is no array."""

    config: Architecture
    spec: Spec


@partial(jax.tree_util.register_dataclass, data_fields=["model", "draft", "tokens", "done", "key", "rounds", "kept"],
         meta_fields=[])  # fmt: skip
@dataclass(frozen=True)
class Speculation:
    """A text between two rounds.

    Attributes:
        model: its cache, of all columns but the newest.
        draft: likewise, of as many columns.
        tokens: what the caches hold, then the newest token (at column `model.length`), then padding.
        done: whether a token to stop at has come.
        key: of the next round's draws.
        rounds: passes of the model since the prompt.
        kept: proposals that were kept.
    """

    model: Cache
    draft: Cache
    tokens: Any  # int32 [1, S]
    done: Any  # bool []
    key: Any
    rounds: Any  # int32 []
    kept: Any  # int32 []


def propose(
    what: Structure,
    params: Params,
    cache: Cache,
    newest: Array,
    key: Array,
    sampling: Sampling,
    count: int,
    how: Execution,
) -> tuple[Cache, Int32[Array, "k"], Float[Array, "k V"]]:
    """`count` tokens from the draft and the log-probabilities they were drawn by; its cache holds all of them."""

    def step(carry: tuple[Cache, Array], key: Array) -> tuple[tuple[Cache, Array], tuple[Array, Array]]:
        cache, token = carry
        real = jnp.ones((1, 1), bool)
        output = forward(what.config, what.spec, params, token[None, None], real, how, cache=cache)
        logs = chances(unembed(what.config, params, output.hidden[0, -1], how), sampling)
        drawn = jax.random.categorical(key, logs).astype(jnp.int32)
        return (output.cache, drawn), (drawn, logs)

    # One step more than tokens: the last one only stores the last proposal.
    (cache, _), (drawn, logs) = jax.lax.scan(step, (cache, newest), jax.random.split(key, count + 1))
    return cache, drawn[:-1], logs[:-1]


def judge(
    proposed: Int32[Array, "k"], draft: Float[Array, "k V"], model: Float[Array, "k+1 V"], key: Key[Array, ""]
) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """How many of the proposals are kept, and the token that follows them.

    Args:
        draft: log-probabilities that each was drawn by.
        model: the model's for the same places, and for the one after them.
    """
    accept, redraw = jax.random.split(key)
    p, q = jnp.exp(model), jnp.exp(draft)
    places = jnp.arange(len(proposed))
    keep = jax.random.uniform(accept, proposed.shape) * q[places, proposed] < p[places, proposed]
    kept = jnp.cumprod(keep.astype(jnp.int32)).sum(dtype=jnp.int32)
    # After the last there is no q: what is left of p is all of it.
    left = jnp.maximum(p[kept] - jnp.pad(q, ((0, 1), (0, 0)))[kept], 0)
    return kept, jax.random.categorical(redraw, jnp.log(left)).astype(jnp.int32)


def rewind(cache: Cache, length: Int32[Array, "B"]) -> Cache:
    """The cache as if its sequences had `length` columns; what lies behind them will be written over."""
    return dataclasses.replace(cache, mask=cache.mask & (jnp.arange(cache.capacity) < length[:, None]), length=length)


@partial(jax.jit, static_argnames=("model", "draft", "count", "how"), donate_argnames="state")
def speculate_until(
    model: Structure,
    draft: Structure,
    params: tuple[Params, Params],
    state: Speculation,
    until: Int32[Array, ""],
    sampling: Sampling,
    eos: Int32[Array, "*E"],
    *,
    count: int,
    how: Execution,
) -> Speculation:
    """Round after round until the caches hold `until` columns or more, or the text has ended; `state` is used up."""

    def go_on(state: Speculation) -> Bool[Array, ""]:
        return (state.model.length[0] < until) & ~state.done

    def play(state: Speculation) -> Speculation:
        start = state.model.length[0]
        key, drawing, judging = jax.random.split(state.key, 3)
        newest = jax.lax.dynamic_slice_in_dim(state.tokens, start, 1, axis=1)
        drafted, proposed, q = propose(draft, params[1], state.draft, newest[0, 0], drawing, sampling, count, how)
        row = jnp.concatenate([newest, proposed[None]], axis=1)
        output = forward(model.config, model.spec, params[0], row, jnp.ones_like(row, bool), how, cache=state.model)
        p = chances(unembed(model.config, params[0], output.hidden[0], how), sampling)
        kept, follows = judge(proposed, q, p, judging)
        made = jnp.pad(proposed, (0, 1)).at[kept].set(follows)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, made[None], start + 1, axis=1)
        ended = (jnp.isin(made, eos) & (jnp.arange(count + 1) <= kept)).any()
        length = (start + kept + 1)[None]
        return Speculation(
            rewind(output.cache, length), rewind(drafted, length), tokens, ended, key, state.rounds + 1,
            state.kept + kept,
        )  # fmt: skip

    return jax.lax.while_loop(go_on, play, state)


@dataclass(frozen=True)
class Speculated:
    """A completion so far.

    Attributes:
        tokens: the completion, to the token that ends it or to as many as were asked for.
        rounds: passes of the model after the prompt's.
        proposed: tokens that the draft has proposed.
        kept: how many of these the model has kept.
    """

    tokens: list[int]
    rounds: int = 0
    proposed: int = 0
    kept: int = 0

    @property
    def acceptance(self) -> float | None:
        """The share of proposals that were kept; None before the first."""
        return self.kept / self.proposed if self.proposed else None


def speculate(
    model: Model,
    draft: Model,
    prompt: list[int],
    max_new_tokens: int = 20,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: bool = True,
    count: int = PROPOSED,
    piece: int | None = None,
) -> Iterator[Speculated]:
    """What follows a prompt (token ids, as `encode_prompt` gives), as the model alone would continue it.

    Greedy, the tokens are those of `generate_tokens` (up to rounding where two are equally likely); sampled, they
    follow the same distribution, drawn in another way.

    Args:
        draft: any smaller or compressed model with the same tokens.
        count: proposals a round.
        piece: tokens between two looks at what is there; all at once, if not given.

    Raises:
        InputError: as `generate_tokens`, for either model; `count` below 1, other tokens, or a cache of blocks, which
            cannot be taken back.
    """
    if count < 1:
        raise InputError(f"the draft is to propose {count} tokens a round; expected at least 1")
    check_vocabulary(model, draft, ("model", "draft"))
    for each in (model, draft):
        check_prompts(each, [prompt], max_new_tokens)
        if any(group.storage in BLOCKS for layer in each.spec.layers for group in layer.groups):
            raise InputError(
                "a cache of blocks (int4, k4v4, ...) cannot take tokens back; expected a model and a draft without one"
            )
    request = Request.checked(model, max_new_tokens, temperature, top_k, top_p, seed, stop)
    sampling, eos = request.sampling, request.eos
    how = model.how
    params = tuple(serving_params(each, how) for each in (model, draft))
    tokens, mask = pad_right([prompt], model.config.pad_token_id)
    start, capacity = len(prompt), bucket(tokens.shape[1] + max_new_tokens + count)
    keys = keys_of(jnp.uint32(seed), jnp.zeros(1, jnp.uint32))
    read, drafted = (
        prefill(each.config, each.spec, weights, tokens, mask, keys, sampling, eos,
                capacity=capacity, how=how)
        for each, weights in zip((model, draft), params, strict=True)
    )  # fmt: skip
    counts = jnp.int32(0), jnp.int32(0)  # two arrays: both are donated
    state = Speculation(read.cache, drafted.cache, read.tokens, read.done[0], read.keys[0], *counts)
    structures = Structure(model.config, model.spec), Structure(draft.config, draft.spec)
    made = 1
    while True:
        columns, done, rounds, kept, held = whole(
            (state.tokens, state.done, state.rounds, state.kept, state.model.length)
        )
        new = request.cut(columns[0, start : min(int(held[0]) + 1, start + max_new_tokens)].tolist())
        yield Speculated(new, int(rounds), int(rounds) * count, int(kept))
        if done or len(new) == max_new_tokens:
            return
        made = min(len(new) + (piece or max_new_tokens), max_new_tokens)
        until = jnp.int32(start + made - 1)
        state = speculate_until(*structures, params, state, until, sampling, eos, count=count, how=how)


def stream_with_draft(
    model: Model,
    draft: Model,
    prompt: str,
    max_new_tokens: int = 20,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    count: int = PROPOSED,
    chat: bool = False,
    system: str | None = None,
) -> Iterator[tuple[str, Speculated]]:
    """`stream` with a draft: pieces of text, each with what has been made so far. Raises as `speculate`."""
    encoded, last = encode_prompt(model, prompt, chat, system), Speculated([])

    def tokens() -> Iterator[list[int]]:
        nonlocal last
        for last in speculate(
            model, draft, encoded, max_new_tokens, temperature, top_k, top_p, seed, count=count, piece=STREAM_TOKENS
        ):
            yield last.tokens

    for piece in as_text(model, tokens()):
        yield piece, last
