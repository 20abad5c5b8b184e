"""Merging the heads of a cluster by linear algebra: closed forms, in float64 on the host.

A representative throws away what the other heads knew; these keep as much of it as a rank allows. With x the layer's
normed input on calibration text, every form is a truncated singular value decomposition of the map that is to be kept,
weighed by the square root of what enters it, hence optimal for its own objective (Eckart and Young 1936). Queries, keys
and values each have moments of their own, in which a token counts by what it does to the layer's output
(`chai_jax.compress.moments`). Of keys and of values mu is the mean and S the covariance, of queries
A = E[[x, 1]' [x, 1]]. No matrix is inverted: after a layer norm, S is always singular.

Biases cost nothing. What is constant over keys (key biases, mu's part of a key) drops out of the softmax; what is
constant over tokens (value biases, mu's part of a value) goes into the output bias, since softmax rows sum to one. So
merged keys and values are centred, and in the white gauge: each column has unit variance, which is also what spreads
the rounding error of an int8 token over its entries in proportion to what each is worth. A family without an output
bias has no place for the constant of its values: theirs are not centred, and S is E[x'x]. Values are merged in
`chai_jax.compress.value_merge`.

Keys that are turned by rotary positions are merged in `chai_jax.compress.rotary_merge`.

Letters: m heads of a cluster, each a key and a value read by n queries, D width, K head dimension, R rank.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import scipy.linalg
from jaxtyping import Float, Inexact

fast_einsum = partial(np.einsum, optimize=True)  # pairwise by BLAS; as it is, numpy loops over all letters at once
NEGLIGIBLE = 1e-8  # of the norm: below it there is only rounding (weights are float32 at best)


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a layer's normed input over tokens that count by some weight, float64.

    Attributes:
        joint: E[[x, 1] [x, 1]'].
    """

    joint: Float[np.ndarray, "D1 D1"]

    @property
    def mean(self) -> Float[np.ndarray, " D"]:
        """mu."""
        return self.joint[-1, :-1]

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """S."""
        return self.joint[:-1, :-1] - np.outer(self.mean, self.mean)

    @property
    def uncentred(self) -> Float[np.ndarray, "D D"]:
        """E[x'x]."""
        return self.joint[:-1, :-1]

    @cached_property
    def uncentred_root(self) -> Float[np.ndarray, "D D"]:
        """E[x'x]^(1/2)."""
        return square_root(self.uncentred)

    @cached_property
    def joint_root(self) -> Float[np.ndarray, "D1 D1"]:
        """A^(1/2)."""
        return square_root(self.joint)

    @cached_property
    def root(self) -> Float[np.ndarray, "D D"]:
        """S^(1/2)."""
        return square_root(self.covariance)


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Of a layer's normed input as queries, keys and values count its tokens (see `chai_jax.compress.moments`)."""

    query: Moments
    key: Moments
    value: Moments


@dataclass(frozen=True, eq=False)
class OutputMoments:
    """Second moments of what a merged attention offers, Z = P_c x, and of what its cluster puts out, Y, float64.

    Attributes:
        z, y: means over tokens.
        zz: E[(Z - z)' (Z - z)].
        zy: E[(Z - z)' (Y - y)].
    """

    z: Float[np.ndarray, " D"]
    y: Float[np.ndarray, " D"]
    zz: Float[np.ndarray, "D D"]
    zy: Float[np.ndarray, "D D"]


@dataclass(frozen=True, eq=False)
class Scores:
    """Queries (one, or one per head) and the key they read: score = (x query + query_bias) . (x key + key_bias).

    `pairs`: of a rotary key, the frequency of each of its complex numbers (see `LayerSpec`).
    """

    query: Float[np.ndarray, "D q R"]
    query_bias: Float[np.ndarray, "q R"]
    key: Float[np.ndarray, "D R"]
    key_bias: Float[np.ndarray, " R"]
    pairs: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Values:
    """One value and the output projections (one, or one per head) of it; `constant` goes into the output bias."""

    value: Float[np.ndarray, "D R"]
    value_bias: Float[np.ndarray, " R"]
    output: Float[np.ndarray, "o R D"]
    constant: Float[np.ndarray, " D"]


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Dense heads, those of a layer or of one cluster, float64; biases that a family does not have are zero.

    The n queries of a head follow one another, and so do their outputs.

    Attributes:
        key_bias: None: it drops out of the softmax, and is of no interest.
        centred: whether constants of the values have a place, in the output bias.
    """

    query: Float[np.ndarray, "D mn K"]
    query_bias: Float[np.ndarray, "mn K"]
    key: Float[np.ndarray, "D m K"]
    value: Float[np.ndarray, "D m K"]
    value_bias: Float[np.ndarray, "m K"]
    output: Float[np.ndarray, "mn K D"]
    key_bias: Float[np.ndarray, "m K"] | None = None
    centred: bool = True

    @property
    def each(self) -> int:
        """n."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def queries(self) -> Float[np.ndarray, "mn D1 K"]:
        """[Wq_h; bq_h] of every query."""
        return np.concatenate([self.query, self.query_bias[None]]).transpose(1, 0, 2)

    def at(self, members: Sequence[int]) -> "HeadWeights":
        """These heads alone."""
        some, n = list(members), self.each
        asking = [head * n + at for head in some for at in range(n)]
        wide = (self.query[:, asking], self.query_bias[asking], self.key[:, some], self.value[:, some])
        key_bias = None if self.key_bias is None else self.key_bias[some]
        return HeadWeights(*wide, self.value_bias[some], self.output[asking], key_bias, self.centred)


def square_root(matrix: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """The symmetric square root of a positive semidefinite matrix; what rounding made negative counts as zero."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def svd(
    rank: int, left: Sequence[Inexact[np.ndarray, "_ _"]], right: Sequence[Inexact[np.ndarray, "_ _"]]
) -> tuple[Inexact[np.ndarray, "M R"], Float[np.ndarray, " R"], Inexact[np.ndarray, "R N"]]:
    """(U_R, s_R, V_R') of the product of the factors, `left` times `right`; what is beyond its own rank is zero.

    Between the two lie few dimensions (two heads of a wide model): left = Q L and right' = P R by QR, and only L R' is
    decomposed. What is negligible beside the factors' norms is their rounding, even where nothing larger is there.
    """
    one, two = (functools.reduce(np.matmul, factors) for factors in (left, right))
    (q, core), (p, other) = (scipy.linalg.qr(matrix, mode="economic") for matrix in (one, two.conj().T))
    core = core @ other.conj().T
    try:
        u, s, vt = scipy.linalg.svd(core, full_matrices=False)
    except scipy.linalg.LinAlgError:  # the divide-and-conquer driver gives up on some matrices, this one does not
        u, s, vt = scipy.linalg.svd(core, full_matrices=False, lapack_driver="gesvd")
    kept = s[:rank] > NEGLIGIBLE * math.prod(np.linalg.norm(factor) for factor in (*left, *right))
    room = (0, max(0, rank - len(s)))
    u, s, vt = (q @ u[:, :rank]) * kept, s[:rank] * kept, (vt[:rank] @ p.conj().T) * kept[:, None]
    return np.pad(u, ((0, 0), room)), np.pad(s, room), np.pad(vt, (room, (0, 0)))


def inverse(s: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """1 / s, and 0 where s is 0."""
    return np.divide(1.0, s, out=np.zeros_like(s), where=s > 0)


def low_rank_scores(heads: HeadWeights, x: InputMoments, rank: int) -> Scores:
    """One query and key for heads that share their attention (`qk`, `qkv`).

    The score form of head h is [q, 1] F_h x' with F_h = [Wq_h; bq_h] Wk_h'; kept is the mean form F = mean_h F_h, as
    A^(1/2) F S^(1/2) = U s V'. Objective: E |[x_q, 1] (F - merged) (x_k - mu)'|^2 for x_q, x_k drawn independently,
    keys by their weight.
    """
    queries = np.concatenate(heads.queries, axis=1) / len(heads.queries)  # [D + 1, m K]
    keys = heads.key.reshape(len(heads.key), -1)  # [D, m K], so that F = queries keys'
    u, s, vt = svd(rank, (x.query.joint_root, queries), (keys.T, x.key.root))
    key = keys @ (queries.T @ (x.query.joint_root @ (u * inverse(s))))
    query = queries @ (keys.T @ (x.key.root @ vt.T))
    return Scores(query[:-1, None], query[-1:], key, -x.key.mean @ key)


def latent_scores(heads: HeadWeights, x: InputMoments, rank: int) -> Scores:
    """A query for each head on one latent key (`kv`).

    G_h = [Wq_h; bq_h]' A [Wq_h; bq_h] weighs head h's key space; N = [Wk_h G_h^(1/2)]_h; S^(1/2) N = U s V'. The latent
    is x N V_R / s, head h reads it through Wk_h ~ (N V_R / s) R_h, R_h = U_R' S^(1/2) Wk_h, which its query absorbs:
    exact where positions do not turn keys (else see `rotary_merge`). Objective: sum over heads of E |score_h - merged
    score_h|^2.
    """
    joined = weighed_keys(heads, x)
    u, s, vt = svd(rank, (x.key.root,), (joined,))
    key = joined @ (vt.T * inverse(s))
    read = fast_einsum("dr,de,emk->mrk", u, x.key.root, heads.key)
    query = fast_einsum("mdk,mrk->dmr", heads.queries, read)
    return Scores(query[:-1], query[-1], key, -x.key.mean @ key)


def weighed_keys(heads: HeadWeights, x: InputMoments) -> Float[np.ndarray, "D mK"]:
    """N = [Wk_h G_h^(1/2)]_h: the keys of all heads side by side, each weighed by what its queries ask for."""
    asked = [query.T @ x.query.joint @ query for query in heads.queries]
    n, heads_asked = heads.each, range(heads.key.shape[1])
    sums = [sum(asked[head * n + 1 : head * n + n], asked[head * n]) for head in heads_asked]
    return np.concatenate([heads.key[:, head] @ square_root(sums[head]) for head in heads_asked], axis=1)
