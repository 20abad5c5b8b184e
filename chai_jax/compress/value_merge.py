"""Merging the values of a cluster, as `chai_jax.compress.merge` merges its scores; letters as there."""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Float

from chai_jax.compress.merge import (
    HeadWeights,
    InputMoments,
    OutputMoments,
    Values,
    fast_einsum,
    inverse,
    square_root,
    svd,
    weighed_keys,
)


@dataclass(frozen=True, eq=False)
class ValueSpace:
    """A cluster's values as a map of what enters them, and what that is worth.

    Centred, this is x - mu, and constants go into the output bias. Without an output bias it is x itself, or [x, 1]
    where values have biases: E is D or D + 1.

    Attributes:
        values: the maps of all heads.
        root: square root of the second moments of what enters.
        mean: mu where values are centred, or else zero.
        biased: whether what enters ends in 1.
    """

    values: Float[np.ndarray, "E m K"]
    root: Float[np.ndarray, "E E"]
    mean: Float[np.ndarray, " E"]
    biased: bool = False

    @classmethod
    def of(cls, heads: HeadWeights, x: InputMoments) -> "ValueSpace":
        """What the family's biases allow."""
        if heads.centred:
            return cls(heads.value, x.value.root, x.value.mean)
        if heads.value_bias.any():
            values = np.concatenate([heads.value, heads.value_bias[None]])
            return cls(values, x.value.joint_root, np.zeros(len(values)), biased=True)
        return cls(heads.value, x.value.uncentred_root, np.zeros(len(heads.value)))

    def merged(
        self, value: Float[np.ndarray, "E R"], output: Float[np.ndarray, "o R D"], constant: Float[np.ndarray, " D"]
    ) -> Values:
        """The value that this map is, with the outputs that read it."""
        kernel, bias = (value[:-1], value[-1]) if self.biased else (value, -self.mean @ value)
        return Values(kernel, bias, output, constant)


def low_rank_values(heads: HeadWeights, x: InputMoments, rank: int) -> Values:
    """One value, and n output projections, for heads that share their attention (`qkv`).

    M_j = sum_h Wv_h Wo_hj, for the j-th query of every head; M = [M_1 ... M_n]; S^(1/2) M = U s V'; the value is
    (x - mu) M V_R / s, the output projections are s V_R'. Objective: E |(x - mu) (M - merged)|^2, the value path of one
    token, tokens by their weight.
    """
    space, n = ValueSpace.of(heads, x), heads.each
    values, outputs = space.values.reshape(len(space.values), -1), _side_by_side(heads.output, n)  # M = values outputs
    _, s, vt = svd(rank, (space.root, values), (outputs,))
    value = values @ (outputs @ (vt.T * inverse(s)))
    output = (s[:, None] * vt).reshape(rank, n, -1).transpose(1, 0, 2)
    if not heads.centred:
        return space.merged(value, output, np.zeros(output.shape[-1]))
    constant = (heads.value_bias.reshape(-1) + space.mean @ values) @ outputs
    return space.merged(value, output, constant.reshape(n, -1).sum(axis=0))


def latent_values(heads: HeadWeights, x: InputMoments, rank: int) -> Values:
    """One latent value and an output projection for each query (`kv`): as `latent_scores`, with (Wo_h Wo_h')^(1/2) for
    G_h^(1/2). Objective: sum over queries of E |(x - mu) (Wv_h - merged) Wo_h|^2."""
    space, n = ValueSpace.of(heads, x), heads.each
    joined = weighed_values(heads, space.values)
    u, s, vt = svd(rank, (space.root,), (joined,))
    value = joined @ (vt.T * inverse(s))
    read = np.repeat(fast_einsum("dr,de,emk->mrk", u, space.root, space.values), n, axis=0)
    if not heads.centred:
        return space.merged(value, read @ heads.output, np.zeros(heads.output.shape[-1]))
    outputs = heads.output if n == 1 else heads.output.reshape(-1, n, *heads.output.shape[1:]).sum(axis=1)
    constant = fast_einsum("dmk,mke,d->e", heads.value, outputs, x.value.mean)
    constant += fast_einsum("mk,mke->e", heads.value_bias, outputs)
    return space.merged(value, read @ heads.output, constant)


def _side_by_side(outputs: Float[np.ndarray, "mn K D"], n: int) -> Float[np.ndarray, "mK nD"]:
    """The output projections of m heads below one another, those of a head's n queries side by side."""
    size, width = outputs.shape[1:]
    return outputs.reshape(-1, n, size, width).transpose(0, 2, 1, 3).reshape(-1, n * width)


def weighed_values(heads: HeadWeights, values: Float[np.ndarray, "E m K"]) -> Float[np.ndarray, "E mK"]:
    """[Wv_h (Wo_h Wo_h')^(1/2)]_h: the values of all heads side by side, each weighed by what is made of it."""
    wide = heads.output.reshape(values.shape[1], heads.each, *heads.output.shape[1:])
    roots = (square_root(sum(output @ output.T for output in outputs)) for outputs in wide)
    return np.concatenate([values[:, head] @ root for head, root in enumerate(roots)], axis=1)


def spectra(heads: HeadWeights, x: InputMoments) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Singular values of a layer's keys and values, as `latent_scores` and `latent_values` cut them off at a rank."""
    space = ValueSpace.of(heads, x)
    pairs = (x.key.root, weighed_keys(heads, x)), (space.root, weighed_values(heads, space.values))
    keys, values = (svd(matrix.shape[1], (root,), (matrix,))[1] for root, matrix in pairs)
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
    if heads.each > 1:
        raise ValueError("several queries of a head share its value: there is no closed form")
    space, zz, zy = ValueSpace.of(heads, x), moments.zz, moments.zy
    if not heads.centred:
        zz, zy = zz + np.outer(moments.z, moments.z), zy + np.outer(moments.z, moments.y)
    if space.biased:  # rows of attention sum to one
        zz = np.block([[zz, moments.z[:, None]], [moments.z[None], np.ones((1, 1))]])
        zy = np.concatenate([zy, moments.y[None]])
    values, outputs = space.values.reshape(len(space.values), -1), np.concatenate(heads.output)  # M = values outputs
    size = len(zz)
    penalty = max(ridge * np.trace(zz) / size, np.finfo(np.float64).tiny)
    # Y lies where the heads put it: of D directions the m K (at most) that their outputs span. B = narrow across'.
    across = scipy.linalg.qr(outputs.T, mode="economic")[0]
    lower = scipy.linalg.cholesky(zz + penalty * np.eye(size), lower=True)
    towards = zy @ across + penalty * values @ (outputs @ across)
    narrow = scipy.linalg.cho_solve((lower, True), towards)
    # Any square root of Z'Z + ridge gives the same singular values and right vectors.
    _, s, vt = svd(rank, (lower.T, narrow), (across.T,))
    value, output = narrow @ (across.T @ (vt.T * inverse(s))), s[:, None] * vt
    constant = moments.y - (moments.z - x.value.mean) @ value @ output if heads.centred else np.zeros(output.shape[-1])
    return space.merged(value, output[None], constant)
