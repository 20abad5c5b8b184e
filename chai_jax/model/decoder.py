"""OPT (Zhang et al. 2022, arXiv 2205.01068) as functions of its parameters: dense and clustered in one forward pass.

Follows transformers' `OPTForCausalLM`: learned positions counted over the mask with an offset of 2, biases on all
projections, pre-norm (125m, 1.3b, ...) or post-norm (350m, with 512-wide embeddings projected in and out), softmax in
float32. Dropout is not applied, in training neither. The spec and the types of the leaves say what each layer is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.attention import attend, attend_in_order, attend_one, attend_prefill
from chai_jax.model.cache import Cache, GroupCache, remember
from chai_jax.model.execution import Execution
from chai_jax.model.int4_store import of_rows
from chai_jax.model.layers import at_columns, layer_norm, project, project_to_heads
from chai_jax.model.params import POSITION_OFFSET, PROJECTIONS, Params
from chai_jax.model.per_prompt import attend_per_prompt
from chai_jax.model.products import product
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Group, LayerSpec, Spec

# Hidden states that meet the vocabulary head at once, so that logits do not fill the memory: 51 MB of float32 at
# V = 50,272 where a model is scored, 206 MB where it trains.
HEAD_ROWS, HEAD_ROWS_TRAINED = 256, 1024

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class Seen:
    """What a layer's attention did (see `chai_jax.model.layerwise`); nothing of it is computed unless it is used.

    Scores and probabilities are None where a kernel attends (`chai_jax.model.kernels`), which never has them whole.
    """

    x: Any  # [B, T, D], the normed input
    scores: Any  # [B, query heads, T, S], scaled, before the softmax; of clusters found per prompt the kept heads'
    probabilities: Any  # likewise
    allowed: Any  # bool [B, T, S]
    heads: Any  # [B, output heads, T, R], before the output projection


jax.tree_util.register_dataclass(Seen)


@dataclass(frozen=True)
class Output:
    """Hidden states before the vocabulary head, and the cache after these tokens."""

    hidden: Any  # [B, T, D], or of the wanted columns [B, N, D]
    cache: Cache


jax.tree_util.register_dataclass(Output)


def projected(layer: LayerSpec, params: Params, x: Float[Array, "B T D"], kernels: str) -> tuple[Array, Array, Array]:
    """Queries, keys and values, each [B, heads, T, R], of one matrix or three (see `fold_projections`)."""
    if "qkv" not in params:
        query, key, value = (project_to_heads(params[name], x, kernels) for name in PROJECTIONS)
        return query, key, value
    queries, keys, values, _ = layer.projected
    shapes = (queries, layer.key_rank), (keys, layer.key_rank), (values, layer.value_rank)
    ends = np.cumsum([heads * rank for heads, rank in shapes])[:-1].tolist()
    parts = zip(jnp.split(project("btd,df->btf", params["qkv"], x, kernels), ends, axis=-1), shapes, strict=True)
    query, key, value = (jnp.swapaxes(part.reshape(*x.shape[:2], *shape), 1, 2) for part, shape in parts)
    return query, key, value


def by_group(layer: LayerSpec, query: Array, key: Array, value: Array) -> list[tuple[Group, Array, Array, Array]]:
    """Split the projected heads by group: (group, query [B,C,q,T,R], key [B,C,T,R], value [B,C*v,T,R])."""
    parts = []
    at_query = at_key = at_value = 0
    for group in layer.groups:
        queries, values = group.clusters * group.queries, group.clusters * group.values
        mine = query[:, at_query : at_query + queries]
        mine = mine.reshape(mine.shape[0], group.clusters, group.queries, *mine.shape[2:])
        parts.append((group, mine, key[:, at_key : at_key + group.clusters], value[:, at_value : at_value + values]))
        at_query, at_key, at_value = at_query + queries, at_key + group.clusters, at_value + values
    return parts


def attention(
    layer: LayerSpec,
    params: Params,
    x: Float[Array, "B T D"],
    allowed: Bool[Array, "B T S"],
    past: tuple[GroupCache, ...] | None,
    start: Int32[Array, ""],
    wanted: Int32[Array, "B N"] | None,
    *,
    scale: float,
    how: Execution,
    plain: bool,
) -> tuple[Float[Array, "B N D"], tuple[GroupCache, ...], Seen]:
    """Self-attention of one layer, group by group; arguments as of `block`, and scores are scaled by `scale`."""
    projections = projected(layer, params, x, how.kernels)
    output = partial(project, "bhtr,hrd->btd", params["output"], kernels=how.kernels)
    if layer.membership == "prompt":
        before = None if past is None else past[0]
        joined, score, probability, new = attend_per_prompt(layer, *projections, allowed, before, start, scale)
        return output(at_columns(joined, wanted, 2)), (new,), Seen(x, score, probability, allowed, joined)
    readable = at_columns(allowed, wanted, 1)
    in_order = past is None and wanted is None
    kernel = kernel_for(how.kernels, in_order=in_order, decoding=past is not None and x.shape[1] == 1, plain=plain)
    heads, scores, probabilities, caches = [], [], [], []
    for index, (group, query, key, value) in enumerate(by_group(layer, *projections)):
        before = None if past is None else past[index]
        new, keys, values = remember(before, key, value, group.storage, start, allowed)
        caches.append(new)
        query = at_columns(query, wanted, 3)
        keys, values = of_rows(keys, wanted), of_rows(values, wanted)
        # What is read of int4 is made for this step, not stored: a kernel would save nothing.
        if kernel is not None and group.storage != "int4":
            heads.append(kernel(query, keys, values, readable, scale, group.values))
            continue
        by_xla = attend_in_order if in_order else attend
        out, score, probability = by_xla(query, keys, values, readable, scale, group.values)
        heads.append(out)
        scores.append(score.reshape(score.shape[0], -1, *score.shape[3:]))
        probabilities.append(probability.reshape(scores[-1].shape))
    joined = jnp.concatenate(heads, axis=1)
    known = len(scores) == len(heads)
    joined_scores, joined_probabilities = (
        jnp.concatenate(parts, axis=1) if known else None for parts in (scores, probabilities)
    )
    return output(joined), tuple(caches), Seen(x, joined_scores, joined_probabilities, readable, joined)


def kernel_for(kernels: str, *, in_order: bool, decoding: bool, plain: bool) -> Callable[..., Array] | None:
    """What attends in place of XLA: for one new token any kernels, for prefill those of TPUs and GPUs."""
    if plain:
        return None
    if decoding and kernels != "xla":
        return partial(attend_one, kernels=kernels)
    return attend_prefill if in_order and kernels == "pallas" else None


def block(
    config: Architecture,
    layer: LayerSpec,
    params: Params,
    x: Float[Array, "B T D"],
    allowed: Bool[Array, "B T S"],
    past: tuple[GroupCache, ...] | None,
    start: Int32[Array, ""],
    wanted: Int32[Array, "B N"] | None = None,
    *,
    how: Execution,
    plain: bool = False,
) -> tuple[Float[Array, "B N D"], tuple[GroupCache, ...], Seen]:
    """One layer: attention and feed-forward, each with its norm before it (pre-norm) or after its residual sum.

    Args:
        allowed: which columns each row may read.
        past: what is stored of the tokens before; None where the sequences begin here.
        start: the first column written.
        wanted: rows that are handed back, all if not given.
        plain: attention is XLA's, whatever the kernels: they know no branches and have no scores to show.
    """
    attend_to = partial(attention, layer, params, scale=config.head_dim**-0.5, how=how, plain=plain)
    norm = partial(layer_norm, params.get("attention_norm", {}))
    y, cache, seen = attend_to(norm(x) if config.pre_norm else x, allowed, past, start, wanted)
    x = at_columns(x, wanted, 1)
    x = x + y if config.pre_norm else norm(x + y)
    norm = partial(layer_norm, params.get("mlp_norm", {}))
    y = project("btd,df->btf", params["up"], norm(x) if config.pre_norm else x, how.kernels)
    y = project("btf,fd->btd", params["down"], ACTIVATIONS[config.activation](y), how.kernels)
    return x + y if config.pre_norm else norm(x + y), cache, seen


def embed(
    params: Params, tokens: Int32[Array, "B T"], positions: Int32[Array, "B T"], how: Execution
) -> Float[Array, "B T D"]:
    """What enters the first layer."""
    x = params["embed"]["tokens"][tokens].astype(how.dtype)
    if "project_in" in params:
        x = project("bte,ed->btd", params["project_in"], x, how.kernels)
    return x + params["embed"]["positions"][positions].astype(how.dtype)


def final_norm(config: Architecture, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The norm behind the last layer, of models that have one."""
    return layer_norm(params.get("final_norm", {}), x) if config.final_norm else x


def visible(
    mask: Bool[Array, "B T"], cache: Cache | None, branch: Int32[Array, "B T"] | None = None
) -> tuple[Array, Array, Array, Array]:
    """Positions [B,T], allowed pairs [B,T,S], the first column written, and the mask [B,S] after these tokens.

    A token's position is the number of tokens that it may read, itself not counted.
    """
    rows = mask.shape[1]
    if cache is None:
        start, all_mask = jnp.zeros((), jnp.int32), mask
    else:
        start = cache.length
        all_mask = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, axis=1)
    columns = jnp.arange(all_mask.shape[1], dtype=jnp.int32)
    causal = columns[None, :] <= start + jnp.arange(rows, dtype=jnp.int32)[:, None]
    allowed = causal[None] & all_mask[:, None, :]
    if branch is not None:
        allowed &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    positions = jnp.where(mask, allowed.sum(axis=2, dtype=jnp.int32), 0) - 1 + POSITION_OFFSET
    return positions, allowed, start, all_mask


def forward(
    config: Architecture,
    spec: Spec,
    params: Params,
    tokens: Int32[Array, "B T"],
    mask: Bool[Array, "B T"],
    how: Execution,
    *,
    cache: Cache | None = None,
    remat: bool = False,
    branch: Int32[Array, "B T"] | None = None,
    wanted: Int32[Array, "B N"] | None = None,
) -> Output:
    """Run the decoder over a parameter tree: the one forward pass of everything.

    Without a cache this is prefill (and scoring, and training): its cache holds exactly these T columns. With a cache,
    T further tokens are written behind its `length` used columns. Positions are counted over the mask, so padding may
    stand left or right. Pure; jit it with `config`, `spec` and `how` static.

    Args:
        mask: True where a token is real.
        how: its dtype is that of the activations; weights are cast to it where they are used. Its layout is not read:
            the arrays' own decides.
        remat: keep only each layer's input for a backward pass, which computes the layer again (`jax.checkpoint`).
        branch: of each token, without a cache: it reads those of branch 0 and of its own, so that one row holds several
            continuations of one text. For specs that are `stored_by_token`.
        wanted: columns whose hidden states are handed back, all if not given. The last layer makes keys, values and
            queries of all, but attends, projects and feeds forward for no others (of clusters found per prompt it
            attends for all).
    """
    if branch is not None and (cache is not None or not spec.stored_by_token):
        raise ValueError("branches of a row need a spec that is stored_by_token, and no cache")
    positions, allowed, start, all_mask = visible(mask, cache, branch)
    x = embed(params, tokens, positions, how)
    layers, last = [], len(spec.layers) - 1
    for index, layer in enumerate(spec.layers):
        with jax.named_scope(f"layer_{index}"):
            run = partial(block, config, layer, params["layers"][str(index)], how=how, plain=branch is not None)
            past = None if cache is None else cache.layers[index]
            x, stored, _ = (jax.checkpoint(run) if remat else run)(
                x, allowed, past, start, wanted if index == last else None
            )
        layers.append(stored)
    after = Cache(tuple(layers), all_mask, start + tokens.shape[1])
    return Output(final_norm(config, params, x), after)


def unembed(
    config: Architecture, params: Params, hidden: Float[Array, "*batch D"], how: Execution
) -> Float[Array, "*batch V"]:
    """float32 logits [..., V] of hidden states [..., D]."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    if "project_out" in params:
        flat = project("btd,de->bte", params["project_out"], flat, how.kernels)
    table = params["embed"]["tokens"] if config.tied else params["head"]["kernel"]
    # The table first: on CPUs XLA is half again as fast at this as at the transpose.
    logits = product("ve,bte->vbt", table.astype(flat.dtype), flat, row="t", kernels=how.kernels)
    return jnp.moveaxis(logits, 0, -1).reshape(*hidden.shape[:-1], -1)
