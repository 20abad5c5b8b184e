"""The basis in which a layer's keys are cached, and what its coordinates foretell of the values.

A key that is wrong by e_s moves the score of a query q_t by q_t' R_(s-t) e_s, R being the rotation to positions, and
with it the layer's output by a_ts (v_s - o_t) W times that: a_ts is the attention, o_t what it mixed, W the output
projection. If errors of tokens are independent, the output's squared error is, to second order, the sum over tokens of
e_s' M e_s, with

    M = mean over s of sum over t of  a_ts^2 |(v_s - o_t) W|^2 (R_(s-t)' q_t) (R_(s-t)' q_t)'

of each key head, the queries that read it counted one by one. This weighs a token by the attention that it gets, and a
direction by what is asked of it. The first tokens and pairs within a block are left out: what they read is stored
whole. Of all bases the eigenvectors V of M^(1/2) C M^(1/2), C being the keys' covariance, leave the least error for so
many bits (Goyal 2001, Theoretical foundations of transform coding): in the coordinates c = (k - mean) M^(1/2) V all
errors weigh alike, and bits go where they take away most (reverse water-filling, by measured error).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from chai_jax.compress.moments import cost_of_scores, summed
from chai_jax.model.block_store import pad
from chai_jax.model.channel_bits import quantize_channels, read_channels
from chai_jax.model.execution import Execution
from chai_jax.model.few_bits import turned
from chai_jax.model.layerwise import anonymous, seen_through
from chai_jax.model.params import Params
from chai_jax.model.rotary import rotate, turns
from chai_jax.model.self_attention import normed, positioned, projected
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.channels import Channels
from chai_jax.plans.formats import BASIS, CHANNEL_BITS, Side
from chai_jax.plans.spec import LayerSpec

FORMAT = BASIS["basis3"]  # block and sinks, of which all have the same
EVERY = 8  # of so many queries one is looked at
RIDGE = 1e-4  # of the mean of what is inverted, added to it


@dataclasses.dataclass(frozen=True)
class KeyBasis:
    """All coordinates of each of C keys of R dimensions, those that vary most first.

    Attributes:
        error: for 0 and each of `CHANNEL_BITS`, what each coordinate adds to the layer's squared error, of all keys.
    """

    mean: Float[np.ndarray, "C R"]
    into: Float[np.ndarray, "C R R"]
    back: Float[np.ndarray, "C R R"]
    error: Float[np.ndarray, "bits R"]

    def channels(self, bits: float) -> Channels:
        """(bits, channels) with the least error of those that take at most so many bits a number of the key, scales
        included: each channel takes from a convex list of bits until the sum is spent."""
        rank, block = self.error.shape[1], FORMAT.block
        sizes = [0.0, *(8 * Side(each, "channel", -2).bytes_of_block(block, 1) / block for each in CHANNEL_BITS)]
        low, high = 0.0, float(self.error.max()) + 1e-30  # error per bit: nothing pays at `high`
        for _ in range(100):
            middle = (low + high) / 2
            chosen = np.argmin(self.error + middle * np.asarray(sizes)[:, None], axis=0)
            low, high = (middle, high) if np.asarray(sizes)[chosen].sum() > bits * rank else (low, middle)
        chosen = np.argmin(self.error + high * np.asarray(sizes)[:, None], axis=0)
        counts = np.bincount(chosen, minlength=len(sizes))
        found = tuple((each, int(count)) for each, count in zip(CHANNEL_BITS, counts[1:], strict=True) if count)
        return found[::-1] or ((CHANNEL_BITS[0], 1),)


def find_basis(
    config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Float[Array, "N W D"], mask: Any
) -> KeyBasis:
    """The basis of a layer that `x` enters; its heads must not be merged.

    Args:
        x, mask: windows of several blocks each, see `chai_jax.compress.calibration.joined`.
    """
    total = summed(partial(key_moments, config, anonymous(layer), how), params, x, mask)
    mean = total["key"] / total["count"]
    covariance = total["pairs"] / total["count"] - mean[:, :, None] * mean[:, None]
    # What coordinates are measured in is free, and a scale's byte reaches only so far: on average they have variance 1.
    weights = np.einsum("crq,cqr->c", covariance, total["asked"]) / config.head_dim + 1e-30
    into, back = map(np.stack, zip(*map(_eigenbasis, covariance, total["asked"] / weights[:, None, None]), strict=True))
    basis = {"mean": mean, "into": into, "back": back}
    basis = {name: value.astype(np.float32) for name, value in basis.items()}
    total = summed(partial(_errors, config, anonymous(layer), how), (params, basis), x, mask)
    return KeyBasis(**basis, error=np.einsum("bcn,c->bn", total["error"], weights) / total["count"])


def _eigenbasis(covariance: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(into, back) of one key, R x R, inverse to one another."""
    asked = asked + (RIDGE * np.trace(asked) / len(asked) + 1e-30) * np.eye(len(asked))
    values, vectors = np.linalg.eigh(asked)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    turn = np.linalg.eigh(root @ covariance @ root)[1][:, ::-1]
    return root @ turn, turn.T @ inverse


def basis_params(
    config: Architecture,
    layer: LayerSpec,
    how: Execution,
    params: Params,
    basis: KeyBasis,
    channels: Channels,
    x: Float[Array, "N W D"],
    mask: Any,
) -> Params:
    """A layer's parameters for these channels (see `chai_jax.model.basis`), in float32.

    Values are foretold by least squares from coordinates that went through few bits, as they are when they are read.
    """
    bits = np.repeat(*np.asarray(channels).T)
    kept = len(bits)
    whole = {"mean": basis.mean, "into": basis.into, "bits": np.pad(bits, (0, basis.mean.shape[1] - kept))}
    total = summed(partial(_value_moments, config, anonymous(layer), how), (params, whole), x, mask)
    known = total["known"][:, : kept + 1, : kept + 1] / total["count"]
    ridge = 1e-6 * np.trace(known, axis1=1, axis2=2)[:, None, None] * np.eye(kept + 1)
    solved = np.linalg.solve(known + ridge, total["both"][:, : kept + 1] / total["count"])
    cut = {"mean": basis.mean, "into": basis.into[:, :, :kept], "back": basis.back[:, :kept]}
    found = {**cut, "values": solved[:, 1:], "offset": solved[:, 0]}
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}


def in_one_program(basis: Params, channels: Channels, rank: int) -> tuple[Channels, Params]:
    """Channels and parameters with the same effect, of one shape whatever `channels` are: to try many of them.

    Every channel has the most bits but is rounded to the levels it should have, which are data; those that are not kept
    are zeros.
    """
    bits = np.repeat(*np.asarray(channels).T)
    room = rank - len(bits)
    padded = {
        "mean": basis["mean"],
        "into": jnp.pad(basis["into"], ((0, 0), (0, 0), (0, room))),
        "back": jnp.pad(basis["back"], ((0, 0), (0, room), (0, 0))),
        "values": jnp.pad(basis["values"], ((0, 0), (0, room), (0, 0))),
        "offset": basis["offset"],
        "levels": jnp.asarray(np.pad(2.0**bits, (0, room), constant_values=2.0), jnp.float32),
    }
    return ((CHANNEL_BITS[-1], rank),), padded


def observed(config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Array, mask: Array) -> Any:
    """What attention sees and did; keys before their rotation and values [B, C, T, R]; queries [B, C, q, T, R]."""
    _, seen = seen_through(config, layer, how, params, x, mask)
    query, key, value = projected(layer, params, seen.x, "xla")
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), mask.shape)
    query, key = normed(config, params, query, key)
    asked = positioned(config, layer, params, query, key, positions)[0]
    return seen, key, value, asked.reshape(key.shape[0], key.shape[1], -1, *asked.shape[2:])


def stored_tokens(mask: Array) -> Array:
    """Which tokens [B, T] are ever stored in few bits."""
    return mask & (jnp.arange(mask.shape[1]) >= FORMAT.sinks)


@partial(jax.jit, static_argnums=(0, 1, 2))
def key_moments(
    config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Array, mask: Array
) -> dict[str, Array]:
    """Sums over tokens of keys, of their squares, and of M."""
    seen, key, value, query = observed(config, layer, how, params, x, mask)
    counted = jnp.where(stored_tokens(mask)[:, None, :, None], key, 0.0)
    weights, query = _damage_of_scores(seen, params, value, query.shape[2], mask), query[:, :, :, ::EVERY]
    turn = _turns(config, x.shape[1])

    def asked(head: tuple[Array, Array]) -> Array:
        """Of one key head of one sequence: queries [q, T, R], weights [q, T, S]."""
        query, weight = head
        pairs = (query[..., :, None] * query[..., None, :]).reshape(-1, query.shape[-1] ** 2)
        by_key = jnp.matmul(weight.reshape(len(pairs), -1).T, pairs, precision="highest")
        by_key = by_key.reshape(-1, query.shape[-1], query.shape[-1])
        if turn is None:
            return by_key.sum(axis=0)
        return jnp.einsum("sai,sij,sbj->ab", turn, by_key, turn, precision="highest")

    heads = (part.reshape(-1, *part.shape[2:]) for part in (query, weights))
    found = jax.lax.map(asked, tuple(heads)).reshape(*key.shape[:2], key.shape[-1], key.shape[-1])
    return {
        "count": stored_tokens(mask).sum(dtype=jnp.float32),
        "key": counted.sum(axis=(0, 2)),
        "pairs": jnp.einsum("bctr,bctq->crq", counted, counted, precision="highest"),
        "asked": found.sum(axis=0),
    }


def _damage_of_scores(seen: Any, params: Params, value: Array, queries: int, mask: Array) -> Array:
    """`cost_of_scores` [B, C, q, T', S], of pairs whose key is read from few bits, for some of the queries."""
    some = seen.probabilities[:, :, ::EVERY], value, seen.heads[:, :, ::EVERY]
    cost = cost_of_scores(*some, params).reshape(len(value), -1, queries, some[0].shape[2], value.shape[2])
    return jnp.where(read_later(mask)[:, None, None], cost, 0.0)


def read_later(mask: Array) -> Array:
    """Which tokens each of some queries reads from few bits, [B, T', S]."""
    block = jnp.arange(mask.shape[1]) // FORMAT.block
    return (block[::EVERY, None] != block[None]) & stored_tokens(mask)[:, None, :] & mask[:, ::EVERY, None]


def _turns(config: Architecture, length: int) -> Array | None:
    """The rotation to each position as a matrix that rows are multiplied by, [T, R, R]; None where there is none."""
    if config.rotary is None:
        return None
    size = config.head_dim
    rows = jnp.broadcast_to(jnp.eye(size), (length, 1, size, size))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[:, None], (length, size))
    return rotate(rows, positions, *turns(config.rotary, size))[:, 0]


def _coordinates(params: Params, key: Array, mask: Array) -> tuple[Array, Array]:
    """Coordinates of all keys as blocks [B, C, N, M, n], and which count, [B, 1, N, M, 1]; what does not count holds
    the block's largest, so that it does not enter its scale."""
    centred = key - params["mean"][:, None]
    coordinates = jnp.einsum("bctr,crn->bctn", centred, params["into"], precision="highest")
    block, real = FORMAT.block, stored_tokens(mask)
    room = -mask.shape[1] % block
    coordinates, real = pad(coordinates, 2, room), pad(real, 1, room)
    blocks = coordinates.reshape(*coordinates.shape[:2], -1, block, coordinates.shape[-1])
    counts = real.reshape(len(real), 1, -1, block, 1)
    largest = jnp.max(blocks, axis=3, keepdims=True, where=counts, initial=-jnp.inf)
    largest = jnp.where(counts.any(axis=3, keepdims=True), largest, 0.0)
    return jnp.where(counts, blocks, largest), counts


@partial(jax.jit, static_argnums=(0, 1, 2))
def _errors(
    config: Architecture, layer: LayerSpec, how: Execution, params: tuple[Params, Params], x: Array, mask: Array
) -> dict[str, Array]:
    """Sums over tokens of the squared error of each coordinate [bits, C, R], for 0 and each of `CHANNEL_BITS`."""
    _, key, _, _ = observed(config, layer, how, params[0], x, mask)
    blocks, counts = _coordinates(params[1], key, mask)

    def error(read: Array) -> Array:
        return jnp.sum(jnp.where(counts, (read - blocks) ** 2, 0.0), axis=(0, 2, 3))

    found = [error(jnp.zeros_like(blocks)), *(error(_through(blocks, bits)) for bits in CHANNEL_BITS)]
    return {"error": jnp.stack(found), "count": stored_tokens(mask).sum(dtype=jnp.float32)}


def _through(blocks: Array, bits: int) -> Array:
    """What is read back of coordinates that are stored in so many bits."""
    return read_channels(quantize_channels(blocks, ((bits, blocks.shape[-1]),)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _value_moments(
    config: Architecture, layer: LayerSpec, how: Execution, params: tuple[Params, Params], x: Array, mask: Array
) -> dict[str, Array]:
    """Sums over tokens of the squares of [1, c], c as read from few bits, and of their products with the values.

    The bits of each coordinate are data, 0 for none, so that all layers share a program.
    """
    _, key, value, _ = observed(config, layer, how, params[0], x, mask)
    blocks, _ = _coordinates(params[1], key, mask)
    read = jnp.zeros_like(blocks)
    for bits in CHANNEL_BITS:
        read = jnp.where(params[1]["bits"] == bits, _through(blocks, bits), read)
    read = read.reshape(*key.shape[:2], -1, read.shape[-1])[:, :, : key.shape[2]]
    known = jnp.pad(read, ((0, 0),) * 3 + ((1, 0),), constant_values=1.0)
    known = jnp.where(stored_tokens(mask)[:, None, :, None], known, 0.0)
    value = turned(value, "basis3")  # as values are stored
    return {
        "known": jnp.einsum("bctn,bctm->cnm", known, known, precision="highest"),
        "both": jnp.einsum("bctn,bctr->cnr", known, value, precision="highest"),
        "count": stored_tokens(mask).sum(dtype=jnp.float32),
    }
