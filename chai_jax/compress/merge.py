"""Merging the heads of a cluster by linear algebra: closed forms, in float64 on the host.

A representative throws away what the other heads knew; these keep as much of it as a rank allows. With x the layer's
normed input (mean mu, covariance S over calibration text), every form is a truncated singular value decomposition of
the map that is to be kept, weighed by the square root of what enters it, hence optimal for its own objective (Eckart
and Young 1936). No matrix is inverted: after a layer norm, S is always singular.

Biases cost nothing. What is constant over keys (key biases, mu's part of a key) drops out of the softmax; what is
constant over tokens (value biases, mu's part of a value) goes into the output bias, since softmax rows sum to one. So
merged keys and values are centred, and in the white gauge: each column has unit variance, which is also what spreads
the rounding error of an int8 token over its entries in proportion to what each is worth.

Letters: m heads of a cluster, D width, K head dimension, R rank.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import scipy.linalg
from jaxtyping import Float

fast_einsum = partial(np.einsum, optimize=True)  # pairwise by BLAS; as it is, numpy loops over all letters at once
NEGLIGIBLE = 1e-8  # of the norm: below it there is only rounding (weights are float32 at best)


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Second moments of a layer's normed input, float64.

    Attributes:
        joint: A = E[[x, 1] [x, 1]'].
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

    @cached_property
    def joint_root(self) -> Float[np.ndarray, "D1 D1"]:
        """A^(1/2)."""
        return square_root(self.joint)

    @cached_property
    def root(self) -> Float[np.ndarray, "D D"]:
        """S^(1/2)."""
        return square_root(self.covariance)


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
    """Queries (one, or one per head) and the key they read: score = (x query + query_bias) . (x key + key_bias)."""

    query: Float[np.ndarray, "D q R"]
    query_bias: Float[np.ndarray, "q R"]
    key: Float[np.ndarray, "D R"]
    key_bias: Float[np.ndarray, " R"]


@dataclass(frozen=True, eq=False)
class Values:
    """One value and the output projections (one, or one per head) of it; `constant` goes into the output bias."""

    value: Float[np.ndarray, "D R"]
    value_bias: Float[np.ndarray, " R"]
    output: Float[np.ndarray, "o R D"]
    constant: Float[np.ndarray, " D"]


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Dense heads, those of a layer or of one cluster, float64."""

    query: Float[np.ndarray, "D m K"]
    query_bias: Float[np.ndarray, "m K"]
    key: Float[np.ndarray, "D m K"]
    value: Float[np.ndarray, "D m K"]
    value_bias: Float[np.ndarray, "m K"]
    output: Float[np.ndarray, "m K D"]

    @property
    def queries(self) -> Float[np.ndarray, "m D1 K"]:
        """[Wq_h; bq_h] of every head."""
        return np.concatenate([self.query, self.query_bias[None]]).transpose(1, 0, 2)

    def at(self, members: Sequence[int]) -> "HeadWeights":
        """These heads alone."""
        some = list(members)
        wide = (self.query[:, some], self.query_bias[some], self.key[:, some], self.value[:, some])
        return HeadWeights(*wide, self.value_bias[some], self.output[some])


def square_root(matrix: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """The symmetric square root of a positive semidefinite matrix; what rounding made negative counts as zero."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def svd(
    rank: int, left: Sequence[Float[np.ndarray, "_ _"]], right: Sequence[Float[np.ndarray, "_ _"]]
) -> tuple[Float[np.ndarray, "M R"], Float[np.ndarray, " R"], Float[np.ndarray, "R N"]]:
    """(U_R, s_R, V_R') of the product of the factors, `left` times `right`; what is beyond its own rank is zero.

    Between the two lie few dimensions (two heads of a wide model): left = Q L and right' = P R by QR, and only L R' is
    decomposed. What is negligible beside the factors' norms is their rounding, even where nothing larger is there.
    """
    one, two = (functools.reduce(np.matmul, factors) for factors in (left, right))
    (q, core), (p, other) = (scipy.linalg.qr(matrix, mode="economic") for matrix in (one, two.T))
    core = core @ other.T
    try:
        u, s, vt = scipy.linalg.svd(core, full_matrices=False)
    except scipy.linalg.LinAlgError:  # the divide-and-conquer driver gives up on some matrices, this one does not
        u, s, vt = scipy.linalg.svd(core, full_matrices=False, lapack_driver="gesvd")
    kept = s[:rank] > NEGLIGIBLE * math.prod(np.linalg.norm(factor) for factor in (*left, *right))
    room = (0, max(0, rank - len(s)))
    u, s, vt = (q @ u[:, :rank]) * kept, s[:rank] * kept, (vt[:rank] @ p.T) * kept[:, None]
    return np.pad(u, ((0, 0), room)), np.pad(s, room), np.pad(vt, (room, (0, 0)))


def inverse(s: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """1 / s, and 0 where s is 0."""
    return np.divide(1.0, s, out=np.zeros_like(s), where=s > 0)


def low_rank_scores(heads: HeadWeights, x: InputMoments, rank: int) -> Scores:
    """One query and key for heads that share their attention (`qk`, `qkv`).

    The score form of head h is [q, 1] F_h x' with F_h = [Wq_h; bq_h] Wk_h'; kept is the mean form F = mean_h F_h, as
    A^(1/2) F S^(1/2) = U s V'. Objective: E |[x_q, 1] (F - merged) (x_k - mu)'|^2 for x_q, x_k drawn independently.
    """
    queries = np.concatenate(heads.queries, axis=1) / len(heads.queries)  # [D + 1, m K]
    keys = heads.key.reshape(len(heads.key), -1)  # [D, m K], so that F = queries keys'
    u, s, vt = svd(rank, (x.joint_root, queries), (keys.T, x.root))
    key = keys @ (queries.T @ (x.joint_root @ (u * inverse(s))))
    query = queries @ (keys.T @ (x.root @ vt.T))
    return Scores(query[:-1, None], query[-1:], key, -x.mean @ key)


def latent_scores(heads: HeadWeights, x: InputMoments, rank: int) -> Scores:
    """A query for each head on one latent key (`kv`).

    G_h = [Wq_h; bq_h]' A [Wq_h; bq_h] weighs head h's key space; N = [Wk_h G_h^(1/2)]_h; S^(1/2) N = U s V'. The latent
    is x N V_R / s, head h reads it through Wk_h ~ (N V_R / s) R_h, R_h = U_R' S^(1/2) Wk_h, which its query absorbs:
    exact, since OPT has no rotary positions. Objective: sum over heads of E |score_h - merged score_h|^2.
    """
    joined = weighed_keys(heads, x)
    u, s, vt = svd(rank, (x.root,), (joined,))
    key = joined @ (vt.T * inverse(s))
    read = fast_einsum("dr,de,emk->mrk", u, x.root, heads.key)
    query = fast_einsum("mdk,mrk->dmr", heads.queries, read)
    return Scores(query[:-1], query[-1], key, -x.mean @ key)


def low_rank_values(heads: HeadWeights, x: InputMoments, rank: int) -> Values:
    """One value and output projection for heads that share their attention (`qkv`).

    M = sum_h Wv_h Wo_h; S^(1/2) M = U s V'; the value is (x - mu) M V_R / s, the output projection s V_R'.
    Objective: E |(x - mu) (M - merged)|^2, the value path of one token.
    """
    values, outputs = heads.value.reshape(len(heads.value), -1), np.concatenate(heads.output)  # M = values outputs
    _, s, vt = svd(rank, (x.root, values), (outputs,))
    value = values @ (outputs @ (vt.T * inverse(s)))
    constant = (heads.value_bias.reshape(-1) + x.mean @ values) @ outputs
    return Values(value, -x.mean @ value, (s[:, None] * vt)[None], constant)


def latent_values(heads: HeadWeights, x: InputMoments, rank: int) -> Values:
    """One latent value and an output projection for each head (`kv`): as `latent_scores`, with (Wo_h Wo_h')^(1/2) for
    G_h^(1/2). Objective: sum over heads of E |(x - mu) (Wv_h - merged) Wo_h|^2."""
    joined = weighed_values(heads)
    u, s, vt = svd(rank, (x.root,), (joined,))
    value = joined @ (vt.T * inverse(s))
    read = fast_einsum("dr,de,emk->mrk", u, x.root, heads.value)
    constant = fast_einsum("dmk,mke,d->e", heads.value, heads.output, x.mean)
    constant += fast_einsum("mk,mke->e", heads.value_bias, heads.output)
    return Values(value, -x.mean @ value, read @ heads.output, constant)


def weighed_keys(heads: HeadWeights, x: InputMoments) -> Float[np.ndarray, "D mK"]:
    """N = [Wk_h G_h^(1/2)]_h: the keys of all heads side by side, each weighed by what its queries ask for."""
    return np.concatenate(
        [heads.key[:, head] @ square_root(query.T @ x.joint @ query) for head, query in enumerate(heads.queries)],
        axis=1,
    )


def weighed_values(heads: HeadWeights) -> Float[np.ndarray, "D mK"]:
    """[Wv_h (Wo_h Wo_h')^(1/2)]_h: the values of all heads side by side, each weighed by what is made of it."""
    roots = (square_root(output @ output.T) for output in heads.output)
    return np.concatenate([heads.value[:, head] @ root for head, root in enumerate(roots)], axis=1)


def spectra(heads: HeadWeights, x: InputMoments) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Singular values of a layer's keys and values, as `latent_scores` and `latent_values` cut them off at a rank."""
    joined = weighed_keys(heads, x), weighed_values(heads)
    keys, values = (svd(matrix.shape[1], (x.root,), (matrix,))[1] for matrix in joined)
    return keys, values


def fitted_values(
    heads: HeadWeights, moments: OutputMoments, x: InputMoments, rank: int, ridge: float = 1e-2
) -> Values:
    """One value and output projection that make up for what the shared attention gets wrong (`qkv`, "fit").

    Reduced-rank regression (Izenman 1975) of the cluster's true output Y = sum_h P_h x Wv_h Wo_h on Z = P_c x, from
    their moments, drawn towards the value path M = sum_h Wv_h Wo_h, which is right where attention is shared exactly:
    B = (Z'Z + ridge)^-1 (Z'Y + ridge M), cut to the R leading principal directions of Z B. Objective:
    E |Y - Z merged|^2 + ridge |merged - M|^2, with ridge relative to the mean variance of Z.
    """
    values, outputs = heads.value.reshape(len(heads.value), -1), np.concatenate(heads.output)  # M = values outputs
    size = len(moments.zz)
    penalty = max(ridge * np.trace(moments.zz) / size, np.finfo(np.float64).tiny)
    # Y lies where the heads put it: of D directions the m K (at most) that their outputs span. B = narrow across'.
    across = scipy.linalg.qr(outputs.T, mode="economic")[0]
    lower = scipy.linalg.cholesky(moments.zz + penalty * np.eye(size), lower=True)
    towards = moments.zy @ across + penalty * values @ (outputs @ across)
    narrow = scipy.linalg.cho_solve((lower, True), towards)
    # Any square root of Z'Z + ridge gives the same singular values and right vectors.
    _, s, vt = svd(rank, (lower.T, narrow), (across.T,))
    value = narrow @ (across.T @ (vt.T * inverse(s)))
    constant = moments.y - (moments.z - x.mean) @ value @ (s[:, None] * vt)
    return Values(value, -x.mean @ value, (s[:, None] * vt)[None], constant)
