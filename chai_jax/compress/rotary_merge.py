"""Merging keys that are turned by rotary positions: only maps that commute with the turning will do.

Read a head's key as K / 2 complex numbers, k_f = x b_f with b_f = Wk[:, f] + i Wk[:, f + K/2], a query likewise as
q_f = x a_f. Positions t and s turn them, so that score = sum_f Re(conj(q_f) k_f e^{i w_f (s - t)}). What may be done to
keys before they are turned and cached is, for every frequency f by itself, a complex linear map over the heads of a
cluster: it commutes with e^{i w_f s}, and the queries absorb it. So a merged key is made of complex numbers of which
each has a frequency, `Scores.pairs`; a frequency may have several, one or none.

Which are kept is decided over all frequencies at once, by singular values. With the phases w_f (s - t) drawn at random
the numbers contribute apart: E |score - merged|^2 = 1/2 sum_f E |conj(q_f) k_f - merged_f|^2 for x_q, x_k drawn
independently, which is the objective of both forms here. A constant key turns with its position and does not drop out
of the softmax, so nothing is centred: x stands for [x, 1], the last row of b_f being its bias.
"""

import numpy as np
from jaxtyping import Complex, Float

from chai_jax.compress.merge import HeadWeights, InputMoments, Scores, inverse, svd

Found = list[tuple[float, int, np.ndarray, np.ndarray]]  # (singular value, frequency, its key, its queries)


def rotary_low_rank_scores(heads: HeadWeights, x: InputMoments, rank: int, whole: bool) -> Scores:
    """A key, and n queries, for heads that share their attention (`qk`, `qkv`).

    Kept is, for the j-th query of every head, the mean form F_jf = mean_h conj(a_hjf) b_hf', as
    [A^(1/2) F_jf]_j A^(1/2) = U s V'.

    Args:
        rank: of the key, even.
        whole: every frequency has exactly one complex number, so that the key is an ordinary head.
    """
    asking, keys, n = _complex(heads.queries.transpose(1, 0, 2)), _keys(heads), heads.each
    asked, root, found = x.query.joint_root, x.key.joint_root, Found()
    for f in range(keys.shape[2]):
        b = keys[:, :, f]  # [E, m]
        a = asking[:, :, f].reshape(len(b), -1, n).transpose(2, 0, 1) / b.shape[1]  # [n, E, m]
        left = np.concatenate([asked @ one.conj() for one in a])  # [n E, m]
        u, s, vh = svd(b.shape[1], (left,), (b.T, root))
        key = b @ (left.T @ u.conj()) * inverse(s)
        inner = b.T @ (root @ vh.conj().T)  # [m, c], so that the conjugate query is conj(a) inner
        queries = np.stack([(one.conj() @ inner).conj() for one in a], axis=1)  # [E, n, c]
        found += [(s[c], f, key[:, c], queries[:, :, c]) for c in range(len(s))]
    return _scores(found, rank, whole)


def rotary_latent_scores(heads: HeadWeights, x: InputMoments, rank: int, whole: bool) -> Scores:
    """One key that every query of the heads reads (`kv`); arguments as of `rotary_low_rank_scores`.

    Head h's key counts by what its queries ask for, g_hf = sum_j E |q_hjf|^2. A^(1/2) [b_hf g_hf^(1/2)]_h = U s V'.
    The numbers are x l_c, l = [b_hf g_hf^(1/2)]_h V / s; head h's key is sum_c u_ch x l_c, with
    u_h = U' A^(1/2) b_hf, which its queries absorb as q conj(u_ch).
    """
    asking, keys, n = _complex(heads.queries.transpose(1, 0, 2)), _keys(heads), heads.each
    asking_root, root, found = x.query.joint_root, x.key.joint_root, Found()
    for f in range(keys.shape[2]):
        b, a = keys[:, :, f], asking[:, :, f]  # [E, m], [E, m n]
        asked = np.sum(np.abs(asking_root @ a) ** 2, axis=0).reshape(-1, n).sum(axis=1)
        weighed = b * np.sqrt(asked)
        u, s, vh = svd(b.shape[1], (root @ weighed,), (np.eye(b.shape[1]),))
        key = weighed @ vh.conj().T * inverse(s)
        read = u.conj().T @ (root @ b)  # [c, m]
        found += [(s[c], f, key[:, c], a * np.repeat(read[c], n).conj()) for c in range(len(s))]
    return _scores(found, rank, whole)


def _complex(x: Float[np.ndarray, "*rows K"]) -> Complex[np.ndarray, "*rows K2"]:
    real, imaginary = np.split(x, 2, axis=-1)
    return real + 1j * imaginary


def _keys(heads: HeadWeights) -> Complex[np.ndarray, "E m K2"]:
    assert heads.key_bias is not None
    return _complex(np.concatenate([heads.key, heads.key_bias[None]]))


def _scores(found: Found, rank: int, whole: bool) -> Scores:
    """The numbers of the largest singular values, real parts first; zeros where there are too few."""
    ranked = sorted(found, key=lambda one: (-one[0], one[1]))
    if whole:
        best = {f: one for one in reversed(ranked) for f in [one[1]]}
        chosen = [best[f] for f in range(rank // 2)]
    else:
        chosen = ranked[: rank // 2]
    nothing = (0.0, 0, np.zeros_like(found[0][2]), np.zeros_like(found[0][3]))
    chosen += [nothing] * (rank // 2 - len(chosen))
    key, query = np.stack([one[2] for one in chosen], axis=-1), np.stack([one[3] for one in chosen], axis=-1)
    key, query = (np.concatenate([part.real, part.imag], axis=-1) for part in (key, query))
    pairs = () if whole else tuple(one[1] for one in chosen)
    return Scores(query[:-1], query[-1], key[:-1], key[-1], pairs)
