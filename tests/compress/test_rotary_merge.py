"""Merges of rotary keys against brute force, on what they are said to be best at."""

import dataclasses
from itertools import combinations_with_replacement

import numpy as np
import pytest

from chai_jax.compress.merge import HeadWeights, InputMoments, Moments, Scores
from chai_jax.compress.rotary_merge import rotary_latent_scores, rotary_low_rank_scores
from chai_jax.compress.value_merge import latent_values, low_rank_values

D, M, N, K = 7, 3, 2, 6
FREQUENCIES = np.array([1.0, 0.3, 0.05])


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


@pytest.fixture
def heads() -> HeadWeights:
    """Three heads of two queries each, all with biases."""
    wide = normal(D, M * N, K), normal(M * N, K), normal(D, M, K), normal(D, M, K) + 0.3
    return HeadWeights(*wide, normal(M, K), normal(M * N, K, D), normal(M, K) - 0.2, centred=False)


@pytest.fixture
def x() -> np.ndarray:
    return normal(60, D) * np.linspace(0.3, 2, D) + 0.5


@pytest.fixture
def read() -> np.ndarray:
    """Other tokens than `x`, as keys count."""
    return normal(61, D)[:60] * np.linspace(2, 0.2, D) - 0.3


def moments_of(x: np.ndarray, read: np.ndarray | None = None) -> InputMoments:
    """Of `x` as queries and values meet it; keys meet `read`, where that is another."""
    both = []
    for tokens in (x, x if read is None else read):
        ones = np.concatenate([tokens, np.ones((len(tokens), 1))], axis=1)
        both.append(Moments(ones.T @ ones / len(tokens)))
    return InputMoments(both[0], both[1], both[0])


def numbers(x: np.ndarray) -> np.ndarray:
    real, imaginary = np.split(x, 2, axis=-1)
    return real + 1j * imaginary


def queries_and_keys(made: HeadWeights | Scores, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[tokens, queries, numbers] and [tokens, heads, numbers]."""
    key, bias = (made.key, made.key_bias) if isinstance(made, HeadWeights) else (made.key[:, None], made.key_bias[None])
    query = np.einsum("td,dhk->thk", x, made.query) + made.query_bias
    return numbers(query), numbers(np.einsum("td,dhk->thk", x, key) + bias)


def score(query: np.ndarray, key: np.ndarray, frequencies: np.ndarray, distance: int) -> float:
    return float((query.conj() * key * np.exp(1j * frequencies * distance)).sum().real)


def errors(made: Scores, heads: HeadWeights, x: np.ndarray, mean: bool, read: np.ndarray | None = None) -> float:
    """1/2 sum over frequencies (and queries) of E |product of numbers - merged product|^2."""
    read = x if read is None else read
    (query, merged_query), (key, merged_key) = (
        [queries_and_keys(one, tokens)[at] for one in (heads, made)] for at, tokens in enumerate((x, read))
    )
    total = 0.0
    for f in range(K // 2):
        own = [at for at, pair in enumerate(made.pairs or range(K // 2)) if pair == f]
        whole = np.einsum("thj,sh->thjs", query[:, :, f].reshape(len(x), M, N).conj(), key[:, :, f])
        part = np.einsum("tqc,sc->tqs", merged_query[:, :, own].conj(), merged_key[:, 0, own])
        wanted = whole.mean(axis=1) if mean else whole.reshape(len(x), M * N, len(x))
        total += float((np.abs(wanted - part) ** 2).mean(axis=(0, 2)).sum()) / 2
    return total


@pytest.mark.parametrize("distance", [0, -3, -11])
def test_full_rank_is_exact(heads: HeadWeights, x: np.ndarray, distance: int) -> None:
    query, key = queries_and_keys(heads, x)
    latent, shared = (
        merge(heads, moments_of(x), M * K, whole=False) for merge in (rotary_latent_scores, rotary_low_rank_scores)
    )
    for made, mean in ((latent, False), (shared, True)):
        merged_query, merged_key = queries_and_keys(made, x)
        frequencies = FREQUENCIES[list(made.pairs)]
        for t, s in ((0, 1), (5, 2)):
            wanted = np.array(
                [score(query[t, q], key[s, q // N], FREQUENCIES, distance) for q in range(M * N)]
            ).reshape(M, N)
            found = [score(one, merged_key[s, 0], frequencies, distance) for one in merged_query[t]]
            np.testing.assert_allclose(found, wanted.mean(axis=0) if mean else wanted.ravel(), atol=1e-9)


@pytest.mark.parametrize("rank", [2, 4, 8, 12])
@pytest.mark.parametrize("mean", [False, True])
def test_the_best_of_their_rank(heads: HeadWeights, x: np.ndarray, read: np.ndarray, rank: int, mean: bool) -> None:
    """Of all ways to give frequencies their numbers, each with its own optimum (Eckart and Young), none is better."""
    moments = moments_of(x, read)
    merge = rotary_low_rank_scores if mean else rotary_latent_scores
    found = errors(merge(heads, moments, rank, whole=False), heads, x, mean, read)
    best = best_by_trying(heads, x, read, rank // 2, mean)
    assert found == pytest.approx(best, rel=1e-9, abs=1e-9)


def best_by_trying(heads: HeadWeights, x: np.ndarray, read: np.ndarray, count: int, mean: bool) -> float:
    query, key = queries_and_keys(heads, x)[0], queries_and_keys(heads, read)[1]
    lost = []
    for f in range(K // 2):
        asked = query[:, :, f].reshape(len(x), M, N).conj()
        # Each query's products with all keys: a matrix of tokens by tokens, whose best approximations share the key.
        if mean:
            rows = np.concatenate([np.einsum("th,sh->ts", asked[:, :, j], key[:, :, f]) / M for j in range(N)])
            spectrum = np.linalg.svd(rows, compute_uv=False) ** 2 / len(x) ** 2
        else:
            weights = np.sqrt((np.abs(asked) ** 2).mean(axis=0).sum(axis=-1))
            spectrum = np.linalg.svd(key[:, :, f] * weights, compute_uv=False) ** 2 / len(x)
        lost.append([spectrum[kept:].sum() / 2 for kept in range(M + 1)])
    choices = (
        [chosen.count(f) for f in range(K // 2)] for chosen in combinations_with_replacement(range(K // 2), count)
    )
    return min(sum(lost[f][kept[f]] for f in range(K // 2)) for kept in choices if max(kept) <= M)


def test_an_ordinary_key_has_every_frequency_once(heads: HeadWeights, x: np.ndarray) -> None:
    for merge, mean in ((rotary_latent_scores, False), (rotary_low_rank_scores, True)):
        made = merge(heads, moments_of(x), K, whole=True)
        assert made.pairs == ()
        free = merge(heads, moments_of(x), K, whole=False)
        assert errors(made, heads, x, mean) >= errors(free, heads, x, mean) - 1e-9
        # One number of each frequency, the best one: a single head is left as it is.
        alone = merge(heads.at([1]), moments_of(x), K, whole=True)
        query, key = queries_and_keys(heads.at([1]), x)
        merged_query, merged_key = queries_and_keys(alone, x)
        np.testing.assert_allclose(merged_query[3].conj() * merged_key[5, 0], query[3].conj() * key[5, 0], atol=1e-9)


def test_more_rank_than_there_is_adds_nothing(heads: HeadWeights, x: np.ndarray) -> None:
    made = rotary_latent_scores(heads, moments_of(x), M * K + 4, whole=False)
    assert made.key.shape == (D, M * K + 4)
    assert not made.key.reshape(D, 2, -1)[:, :, -2:].any()
    alike = dataclasses.replace(heads, key=np.repeat(heads.key[:, :1], M, axis=1), key_bias=np.ones((M, K)))
    made = rotary_latent_scores(alike, moments_of(x), K, whole=False)
    assert sorted(made.pairs) == [0, 1, 2]
    assert errors(made, alike, x, mean=False) < 1e-9


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("rank", [2, 5])
def test_values_without_a_place_for_constants(heads: HeadWeights, x: np.ndarray, biases: bool, rank: int) -> None:
    """The best approximation of what tokens add, not of what they add beyond their mean."""
    if not biases:
        heads = dataclasses.replace(heads, value_bias=np.zeros((M, K)))
    values = np.einsum("td,dmk->tmk", x, heads.value) + heads.value_bias
    outputs = heads.output.reshape(M, N, K, D)
    shared, latent = (merge(heads, moments_of(x), rank) for merge in (low_rank_values, latent_values))
    for made in (shared, latent):
        assert not made.constant.any()
        assert made.value_bias.any() == biases
    wanted = np.einsum("tmk,mjkd->tjd", values, outputs).reshape(len(x), -1)
    found = np.einsum("tr,jrd->tjd", x @ shared.value + shared.value_bias, shared.output).reshape(len(x), -1)
    # The optimum of its rank among maps of [x, 1], or of x where there are no biases.
    spectrum = np.linalg.svd(wanted, compute_uv=False)
    assert ((wanted - found) ** 2).sum() == pytest.approx((spectrum[rank:] ** 2).sum(), rel=1e-6)
    full = latent_values(heads, moments_of(x), M * K)
    each = np.einsum("tmk,mjkd->tmjd", values, outputs).reshape(len(x), M * N, D)
    np.testing.assert_allclose(np.einsum("tr,qrd->tqd", x @ full.value + full.value_bias, full.output), each, atol=1e-8)
