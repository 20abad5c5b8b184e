"""Self-attention of one layer: projections, positions, the cache, and attention group by group."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from chai_jax.model.attention import attend, attend_in_order, attend_one, attend_prefill
from chai_jax.model.block_store import Windowed, of_rows
from chai_jax.model.cache import GroupCache, remember
from chai_jax.model.execution import Execution
from chai_jax.model.few_bits import turned
from chai_jax.model.layers import at_columns, norm, project, project_to_heads
from chai_jax.model.params import PROJECTIONS, Params
from chai_jax.model.per_prompt import attend_per_prompt
from chai_jax.model.place import Place
from chai_jax.model.rotary import rotate, turns
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import BLOCKS
from chai_jax.plans.spec import Group, LayerSpec


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


def normed(config: Architecture, params: Params, query: Array, key: Array) -> tuple[Array, Array]:
    """Queries and keys, each normed where the family does so."""
    if config.qk_norm:
        query = norm(params.get("query_norm", {}), query, config.norm, config.norm_epsilon)
        key = norm(params.get("key_norm", {}), key, config.norm, config.norm_epsilon)
    return query, key


def positioned(
    config: Architecture, layer: LayerSpec, params: Params, query: Array, key: Array, positions: Int32[Array, "B T"]
) -> tuple[Array, Array]:
    """Normed queries and keys as scores are made of them: turned to their positions, where the family does so."""
    if config.rotary is None:
        return query, key
    by = turns(config.rotary, config.head_dim)
    pairs = params.get("pairs", layer.pairs)  # as data where layers share a program (see `layerwise`)
    if not len(pairs):
        return rotate(query, positions, *by), rotate(key, positions, *by)
    frequencies, sizes = (jnp.asarray(each)[jnp.asarray(pairs)] for each in by)
    read = [group.queries for group in layer.groups for _ in range(group.clusters)]
    asked = np.repeat(np.arange(len(read)), read)
    return rotate(query, positions, frequencies[asked], sizes[asked]), rotate(key, positions, frequencies, sizes)


def attention(
    config: Architecture,
    layer: LayerSpec,
    params: Params,
    x: Float[Array, "B T D"],
    place: Place,
    past: tuple[GroupCache, ...] | None,
    wanted: Int32[Array, "B N"] | None,
    *,
    how: Execution,
    plain: bool,
) -> tuple[Float[Array, "B N D"], tuple[GroupCache, ...], Seen]:
    """Self-attention of one layer, group by group; arguments as of `block`."""
    query, key, value = projected(layer, params, x, how.kernels)
    query, unturned = normed(config, params, query, key)
    query, key = positioned(config, layer, params, query, unturned, place.positions)
    output = partial(project, "bhtr,hrd->btd", params["output"], kernels=how.kernels)
    allowed, scale = place.within(layer.window), config.head_dim**-0.5
    if layer.membership == "prompt":
        before = None if past is None else past[0]
        joined, score, probability, new = attend_per_prompt(
            layer, query, key, value, allowed, place.real, before, place.start, scale, how
        )
        return output(at_columns(joined, wanted, 2)), (new,), Seen(x, score, probability, allowed, joined)
    readable = at_columns(allowed, wanted, 1)
    in_order = past is None and wanted is None
    # Kernels that read a whole sequence know no windows; one as long as the sequence hides nothing.
    plain, decoding = plain or (0 < layer.window < x.shape[1] and past is None), past is not None and x.shape[1] == 1
    kernel = kernel_for(how.kernels, in_order=in_order, decoding=decoding, plain=plain)
    heads, scores, probabilities, caches = [], [], [], []
    stored = unturned if layer.channels else key  # in a basis, keys are stored before their rotation
    for index, (group, queries, keys, values) in enumerate(by_group(layer, query, stored, value)):
        before = None if past is None else past[index]
        values = turned(values, group.storage)
        basis = layer.channels, params.get("basis")
        new, keys, values = remember(before, keys, values, group.storage, place.start, place.real, how, *basis)
        if layer.channels:
            keys = rotated_keys(config, keys, place.columns)
        caches.append(new)
        queries = at_columns(queries, wanted, 3)
        keys, values = of_rows(keys, wanted), of_rows(values, wanted)
        # What several rows read of blocks is made for this step, not stored: a kernel would save nothing.
        if kernel is not None and (decoding or group.storage not in BLOCKS):
            out = kernel(queries, keys, values, readable, scale, group.values)
            heads.append(turned(out, group.storage))
            continue
        by_xla = attend_in_order if in_order else attend
        out, score, probability = by_xla(queries, keys, values, readable, scale, group.values)
        heads.append(turned(out, group.storage))
        scores.append(score.reshape(score.shape[0], -1, *score.shape[3:]))
        probabilities.append(probability.reshape(scores[-1].shape))
    joined = jnp.concatenate(heads, axis=1)
    known = len(scores) == len(heads)
    joined_scores, joined_probabilities = (
        jnp.concatenate(parts, axis=1) if known else None for parts in (scores, probabilities)
    )
    return output(joined), tuple(caches), Seen(x, joined_scores, joined_probabilities, readable, joined)


def rotated_keys(config: Architecture, keys: Any, positions: Int32[Array, "B S"]) -> Any:
    """Keys that were stored before their rotation, [B, C, S, R] plain or in two precisions, rotated to these."""
    if config.rotary is None:
        return keys
    frequencies, sizes = turns(config.rotary, config.head_dim)
    turn = partial(rotate, positions=positions, frequencies=frequencies, sizes=sizes)
    return keys.each(turn) if isinstance(keys, Windowed) else turn(keys)


def kernel_for(kernels: str, *, in_order: bool, decoding: bool, plain: bool) -> Callable[..., Array] | None:
    """What attends in place of XLA: for one new token any kernels, for prefill those of TPUs and GPUs."""
    if plain:
        return None
    if decoding and kernels != "xla":
        return partial(attend_one, kernels=kernels)
    return attend_prefill if in_order and kernels == "pallas" else None
