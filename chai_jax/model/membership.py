"""Which head belongs to which cluster, decided sequence by sequence inside jit: features, K-Means, medoids.

CHAI (Agarwal et al. 2024, arXiv 2403.08058, section 3.3) clusters the heads of a layer by what they attend to on a
prompt's first tokens. All shapes are static and nothing is drawn at random, so that one program serves every prompt.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

ITERATIONS = 16  # of K-Means; some tens of heads settle in fewer than ten


@partial(jax.tree_util.register_dataclass, data_fields=["cluster_of", "medoids"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Membership:
    """The clusters of one layer, for each sequence of a batch."""

    # Any, because tree operations put other things (shapes, shardings) in their places.
    cluster_of: Any  # int32 [B, H], below C
    medoids: Any  # int32 [B, C], the head whose query and key each cluster keeps

    @property
    def nbytes(self) -> int:
        return self.cluster_of.nbytes + self.medoids.nbytes

    def keep(self, heads: Float[Array, "B H T K"]) -> Float[Array, "B C T K"]:
        """The medoids' heads."""
        return jnp.take_along_axis(heads, self.medoids[:, :, None, None], axis=1)

    def where(self, chosen: Bool[Array, " B"], other: "Membership") -> "Membership":
        """This membership for the sequences that are `chosen`, the `other` one for the rest."""
        return jax.tree.map(lambda mine, theirs: jnp.where(chosen[:, None], mine, theirs), self, other)


def calibrated(clusters: Sequence[Sequence[int]], batch: int) -> Membership:
    """The same clusters, each led by its representative, for all sequences."""
    cluster_of = np.empty(sum(map(len, clusters)), np.int32)
    for number, heads in enumerate(clusters):
        cluster_of[list(heads)] = number
    medoids = np.asarray([heads[0] for heads in clusters], np.int32)
    return Membership(*(jnp.broadcast_to(jnp.asarray(row), (batch, len(row))) for row in (cluster_of, medoids)))


def features(probabilities: Float[Array, "B H W W"]) -> Float[Array, "B H F"]:
    """What heads are compared by: their attention rows over a sequence's first W tokens, one after the other (F = W W).

    Each row is centred over the keys it may read, as in calibration (`chai_jax.analyse.probe`). The first token is left
    out, since heads rest on it when they have nothing to do. Then the first two rows are zero: they read no other key,
    or one, which centring makes zero. Of five tokens the rows of two, three and four keys remain.
    """
    width = probabilities.shape[-1]
    keys = np.tril(np.ones((width, width), bool))
    keys[:, 0] = False
    counts = np.maximum(keys.sum(axis=-1, keepdims=True, dtype=np.float32), np.float32(1))
    rows = jnp.where(keys, probabilities, 0.0)
    rows = jnp.where(keys, rows - rows.sum(axis=-1, keepdims=True) / counts, 0.0)
    return jax.lax.stop_gradient(rows.reshape(*rows.shape[:2], -1))


def _distances(points: Float[Array, "N F"], centres: Float[Array, "M F"]) -> Float[Array, "N M"]:
    """Squared distances, from differences: equal points are at exactly 0, which a dot product would not give."""
    return jnp.square(points[:, None] - centres[None]).sum(axis=-1)


def farthest_points(points: Float[Array, "H F"], count: int) -> Float[Array, "C F"]:
    """Where K-Means starts: at the longest point, then again and again at the point farthest from all centres so far.

    Of equally far ones the first. Katsavounidis, Kuo, Zhang, "A new initialization technique for generalized Lloyd
    iteration", IEEE Signal Processing Letters 1(10), 1994.
    """

    def add(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, distance = state
        centre = points[jnp.argmax(distance)]
        return centres.at[number].set(centre), jnp.minimum(distance, _distances(points, centre[None])[:, 0])

    first = points[jnp.argmax(jnp.square(points).sum(axis=-1))]
    start = jnp.tile(first, (count, 1)), _distances(points, first[None])[:, 0]
    return jax.lax.fori_loop(1, count, add, start)[0]


def assign_points(points: Float[Array, "H F"], centres: Float[Array, "C F"]) -> Int32[Array, " H"]:
    """The nearest centre of each point (the first of equally near ones), but no cluster is empty (if C <= H).

    A centre that is nearest to no point takes a point of another cluster: the one farthest from its centre. The point
    nearest to a centre stays, so that the other cluster does not become empty.
    """
    distances = _distances(points, centres)
    labels = jnp.argmin(distances, axis=1).astype(jnp.int32)
    numbers = jnp.arange(len(centres), dtype=jnp.int32)
    mine = labels[:, None] == numbers
    empty = ~mine.any(axis=0)
    index = jnp.arange(len(points), dtype=jnp.int32)
    last = jnp.argmin(jnp.where(mine, distances, jnp.inf), axis=0)[labels] == index
    spare = jnp.where(last, -1.0, distances.min(axis=1))
    # Ranks by comparison: there are few points, and a sort takes long to compile.
    before = (spare[None] > spare[:, None]) | ((spare[None] == spare[:, None]) & (index[None] < index[:, None]))
    rank = before.sum(axis=1, dtype=jnp.int32)
    takes = empty & (rank[:, None] == jnp.cumsum(empty, dtype=jnp.int32) - 1)
    return jnp.where(takes.any(axis=1), jnp.argmax(takes, axis=1).astype(jnp.int32), labels)


def kmeans(points: Float[Array, "H F"], centres: Float[Array, "C F"]) -> Int32[Array, " H"]:
    """Labels after `ITERATIONS` of Lloyd's algorithm from the given centres; no cluster is ever empty."""

    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        labels = assign_points(points, state[0])
        mine = (labels[:, None] == jnp.arange(len(centres), dtype=jnp.int32)).astype(points.dtype)
        sums = jnp.einsum("hc,hf->cf", mine, points, precision="highest")
        return sums / mine.sum(axis=0)[:, None], labels

    return jax.lax.fori_loop(0, ITERATIONS, step, (centres, jnp.zeros(len(points), jnp.int32)))[1]


def find_medoids(points: Float[Array, "H F"], labels: Int32[Array, " H"], count: int) -> Int32[Array, " C"]:
    """Of each cluster, the point with the smallest summed distance to the others; the first of several."""
    distances = jnp.sqrt(_distances(points, points))
    summed = jnp.where(labels[:, None] == labels, distances, 0.0).sum(axis=1)
    mine = labels[:, None] == jnp.arange(count, dtype=jnp.int32)
    return jnp.argmin(jnp.where(mine, summed[:, None], jnp.inf), axis=0).astype(jnp.int32)


@partial(jax.vmap, in_axes=(0, None))
def cluster_heads(points: Float[Array, "H F"], count: int) -> Membership:
    """Each sequence's heads, given by their `features` [B, H, F], in `count` clusters."""
    labels = kmeans(points, farthest_points(points, count))
    return Membership(labels, find_medoids(points, labels, count))
