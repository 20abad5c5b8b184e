"""Attention of a layer whose clusters are found anew for every prompt (CHAI, arXiv 2403.08058, section 3.3).

Queries at a sequence's first tokens, its warm-up, read the keys of all H heads. What they attend to decides the
sequence's clusters; from there on queries read the C kept keys, which are kept for the warm-up's tokens too. A sequence
shorter than the warm-up has the calibrated clusters from its first token on. What is read without a cache is taken for
a prompt and decides; with a cache, the membership stored there is obeyed. Decided once, it never changes.

The weights of all heads stay, so all queries and keys are computed and most are dropped: cached keys and attention
scores shrink to C / H, the projections do not.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from chai_jax.model.attention import attend, mix_values, scores_of
from chai_jax.model.block_store import Windowed
from chai_jax.model.by_row import Starts
from chai_jax.model.cache import GroupCache, remember
from chai_jax.model.execution import Execution
from chai_jax.model.few_bits import turned
from chai_jax.model.membership import Membership, calibrated, cluster_heads, features
from chai_jax.model.one_row import OneRow
from chai_jax.model.quantized import Leaf
from chai_jax.plans.spec import LayerSpec


def mix_assigned(
    probabilities: Float[Array, "B C T S"],
    values: Leaf | Windowed | OneRow,
    cluster_of: Int32[Array, "B H"],
    dtype: DTypeLike,
) -> Float[Array, "B H T R"]:
    """Weighted sums of the values [B, H, S, R], each head's under its cluster's attention.

    Which heads share a matrix differs from sequence to sequence, so no fixed matmul takes a cluster at once, as
    `mix_values` does. One query row is spread over the heads, where it costs nothing; of many rows, one head's matrix
    at a time is looked up (and looked up again for the gradient), so that [B, H, T, S] never exists.
    """
    if isinstance(values, OneRow):
        values = values.expanded(dtype)
    if isinstance(values, Windowed):
        recent = jnp.where(values.fresh[:, None], probabilities, 0.0)
        old = mix_assigned(probabilities - recent, values.old, cluster_of, dtype)
        return old + mix_assigned(recent, values.recent, cluster_of, dtype)
    if probabilities.shape[2] == 1:
        spread = jnp.take_along_axis(probabilities, cluster_of[:, :, None, None], axis=1)
        return mix_values(spread[:, :, None], values, 1, dtype)

    @jax.checkpoint
    def mix(head: tuple[Leaf, Array]) -> Array:
        value, cluster = head
        own = jnp.take_along_axis(probabilities, cluster[:, None, None, None], axis=1)
        return mix_values(own[:, :, None], value, 1, dtype)[:, 0]

    one_by_one = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], values), cluster_of.T
    return jnp.moveaxis(jax.lax.map(mix, one_by_one), 0, 1)


def attend_warmup(
    query: Float[Array, "B H T K"],
    keys: Array | Windowed,
    values: Array | Windowed,
    real: Bool[Array, "B T"],
    scale: float,
    width: int,
) -> tuple[Float[Array, "B H W R"], Float[Array, "B H W W"]]:
    """Outputs and attention of all heads on the first `width` (at most T) real tokens of each sequence.

    No query there reads anything later, so these few tokens are all that is looked at.
    """
    first = jnp.argsort(~real, axis=1, stable=True)[:, :width]
    query, keys, values = _columns(query, first), _columns(keys, first), _columns(values, first)
    allowed = jnp.broadcast_to(np.tril(np.ones((width, width), bool)), (len(real), width, width))
    outputs, _, probabilities = attend(query[:, :, None], keys, values, allowed, scale, 1)
    return outputs, probabilities[:, :, 0]


def _columns(x: Array | Windowed, chosen: Int32[Array, "B W"]) -> Any:
    """Of [B, H, T, R] the chosen columns, as rows in the same places read them."""
    if isinstance(x, Windowed):
        rows = jnp.take_along_axis(x.fresh, chosen[:, :, None], axis=1)
        fresh = jnp.take_along_axis(rows, jnp.broadcast_to(chosen[:, None], (*chosen.shape, chosen.shape[1])), axis=2)
        return Windowed(_columns(x.old, chosen), _columns(x.recent, chosen), fresh)
    return jnp.take_along_axis(x, chosen[:, None, :, None], axis=2)


def decide(layer: LayerSpec, attention: Float[Array, "B H W W"], long_enough: Bool[Array, " B"]) -> Membership:
    """The clusters that the warm-up's attention asks for; the calibrated ones for sequences that are too short."""
    found = cluster_heads(features(attention), layer.key_heads)
    return found.where(long_enough, calibrated(layer.clusters, len(attention)))


def attend_per_prompt(
    layer: LayerSpec,
    query: Float[Array, "B H T K"],
    key: Float[Array, "B H T K"],
    value: Float[Array, "B H T R"],
    allowed: Bool[Array, "B T S"],
    real: Bool[Array, "B S"],
    past: GroupCache | None,
    start: Starts,
    scale: float,
    how: Execution | None = None,
) -> tuple[Float[Array, "B H T R"], Float[Array, "B C T S"], Float[Array, "B C T S"], GroupCache]:
    """Outputs of all heads, scores and probabilities of the kept ones, and the cache after these tokens.

    Args:
        real: which columns hold tokens.
        past: what is stored of the tokens before; None where the sequences begin here.
        start: the first column that each sequence writes.
        how: as of `chai_jax.model.cache.append`.
    """
    (group,) = layer.groups
    value = turned(value, group.storage)
    remembered = partial(remember, past, storage=group.storage, start=start, real=real, how=how)
    if past is not None:
        membership = past.membership
    else:
        _, keys, values = remembered(key, value)
        number = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        long_enough = number[:, -1] + 1 >= layer.warmup
        first, attention = attend_warmup(query, keys, values, real, scale, min(layer.warmup, real.shape[1]))
        membership = decide(layer, attention, long_enough)
    new, keys, values = remembered(membership.keep(key), value)
    scores = scores_of(membership.keep(query)[:, :, None], keys, allowed, scale)[:, :, 0]
    probabilities = jax.nn.softmax(scores, axis=-1)
    heads = mix_assigned(probabilities, values, membership.cluster_of, query.dtype)
    if past is None:
        full = real & (number < layer.warmup) & long_enough[:, None]
        at = jnp.clip(number, 0, first.shape[2] - 1)
        heads = jnp.where(full[:, None, :, None], jnp.take_along_axis(first, at[:, None, :, None], axis=2), heads)
    return turned(heads, group.storage), scores, probabilities, dataclasses.replace(new, membership=membership)
