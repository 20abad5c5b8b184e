"""Each closed form against brute force on its own objective; exact at full rank, and defined where S is singular."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize

from chai_jax.compress.merge import (
    HeadWeights,
    InputMoments,
    Moments,
    OutputMoments,
    Scores,
    Values,
    latent_scores,
    low_rank_scores,
    svd,
)
from chai_jax.compress.value_merge import fitted_values, latent_values, low_rank_values, spectra

D, M, K, N = 6, 3, 2, 100


@pytest.fixture
def x() -> np.ndarray:
    """Inputs as a layer norm leaves them: they sum to zero over the width before its bias, so S is singular."""
    random = np.random.default_rng(0)
    x = random.standard_normal((N, D)) * np.asarray([3.0, 1.0, 0.5, 2.0, 0.1, 1.0])
    return x - x.mean(axis=1, keepdims=True) + random.standard_normal(D)


@pytest.fixture
def heads() -> HeadWeights:
    random = np.random.default_rng(1)
    shapes = ((D, M, K), (M, K), (D, M, K), (D, M, K), (M, K), (M, K, D))
    return HeadWeights(*(random.standard_normal(shape) for shape in shapes))


@pytest.fixture
def read() -> np.ndarray:
    """Other tokens than `x`, as keys count."""
    return np.random.default_rng(6).standard_normal((N, D)) * np.asarray([0.2, 2.0, 1.0, 0.3, 1.0, 3.0]) + 0.5


def moments_of(x: np.ndarray, read: np.ndarray | None = None, mixed: np.ndarray | None = None) -> InputMoments:
    """Of `x` as queries meet it; keys meet `read` and values `mixed`, where they are others."""
    found = []
    for tokens in (x, x if read is None else read, x if mixed is None else mixed):
        ones = np.concatenate([tokens, np.ones((len(tokens), 1))], axis=1)
        found.append(Moments(ones.T @ ones / len(tokens)))
    return InputMoments(*found)


def head_scores(heads: HeadWeights, x: np.ndarray, read: np.ndarray | None = None) -> np.ndarray:
    """[m, T, S], keys centred: what is constant over keys means nothing to a softmax."""
    query = np.einsum("td,dmk->mtk", x, heads.query) + heads.query_bias[:, None]
    read = x if read is None else read
    return query @ np.einsum("sd,dmk->msk", read - read.mean(axis=0), heads.key).transpose(0, 2, 1)


def merged_scores(merged: Scores, x: np.ndarray, read: np.ndarray | None = None) -> np.ndarray:
    query = np.einsum("td,dqr->qtr", x, merged.query) + merged.query_bias[:, None]
    return query @ ((x if read is None else read) @ merged.key + merged.key_bias).T


def head_values(heads: HeadWeights, x: np.ndarray) -> np.ndarray:
    """[m, T, D]: what each head adds to the output if it attends to one token alone."""
    value = np.einsum("td,dmk->mtk", x, heads.value) + heads.value_bias[:, None]
    return np.einsum("mtk,mkd->mtd", value, heads.output)


def merged_values(merged: Values, x: np.ndarray) -> np.ndarray:
    return np.einsum("tr,ord->otd", x @ merged.value + merged.value_bias, merged.output) + merged.constant / len(
        merged.output
    )


def square(error: np.ndarray) -> float:
    return float(np.square(error).mean())


def best_by_search(target: np.ndarray, left: np.ndarray, right: np.ndarray, rank: int) -> float:
    """Least mean square of target - left A B right over A [., rank], B [rank, .], by descent from several starts."""
    sizes = (left.shape[1], rank), (rank, right.shape[0])
    cut = sizes[0][0] * rank

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = flat[:cut].reshape(sizes[0]), flat[cut:].reshape(sizes[1])
        error = left @ a @ b @ right - target
        back = 2 / error.size * left.T @ error
        return square(error), np.concatenate([(back @ (b @ right).T).ravel(), (a.T @ back @ right.T).ravel()])

    random = np.random.default_rng(2)
    starts = random.standard_normal((6, cut + rank * sizes[1][1]))
    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-12}
    return min(scipy.optimize.minimize(loss, at, jac=True, method="L-BFGS-B", options=options).fun for at in starts)


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_scores_are_the_best_of_their_rank(
    heads: HeadWeights, x: np.ndarray, read: np.ndarray, rank: int
) -> None:
    wanted = head_scores(heads, x, read).mean(axis=0)
    found = square(wanted - merged_scores(low_rank_scores(heads, moments_of(x, read), rank), x, read)[0])
    ones = np.concatenate([x, np.ones((N, 1))], axis=1)
    assert found == pytest.approx(best_by_search(wanted, ones, (read - read.mean(axis=0)).T, rank), rel=1e-5)
    assert found > 1e-3


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_values_are_the_best_of_their_rank(
    heads: HeadWeights, x: np.ndarray, read: np.ndarray, rank: int
) -> None:
    merged = low_rank_values(heads, moments_of(read, read, x), rank)
    wanted = head_values(heads, x).sum(axis=0)
    found = square(wanted - merged_values(merged, x)[0])
    centred = x - x.mean(axis=0)
    brute = best_by_search(wanted - wanted.mean(axis=0), centred, np.eye(D), rank)
    assert found == pytest.approx(brute, rel=1e-5)
    assert found > 1e-3


@pytest.mark.parametrize("rank", [2, 4])
def test_latent_scores_are_the_best_of_their_rank(
    heads: HeadWeights, x: np.ndarray, read: np.ndarray, rank: int
) -> None:
    """All heads read one latent: sum over heads of |score_h - A_h latent|^2, weighed by what the queries are."""
    wanted = head_scores(heads, x, read)
    found = square(wanted - merged_scores(latent_scores(heads, moments_of(x, read), rank), x, read))
    # A latent x A read by each head's query in its best way is a projection of the keys, so search over A alone.
    centred = read - read.mean(axis=0)
    query = np.einsum("td,dmk->mtk", x, heads.query) + heads.query_bias[:, None]

    def loss(flat: np.ndarray) -> float:
        latent, *_ = np.linalg.qr(centred @ flat.reshape(D, rank))
        keys = np.einsum("sd,dmk->msk", centred, heads.key)
        rest = keys - latent @ (latent.T @ keys)
        return square(query @ rest.transpose(0, 2, 1))

    starts = np.random.default_rng(3).standard_normal((8, D * rank))
    assert found == pytest.approx(min(scipy.optimize.minimize(loss, at).fun for at in starts), rel=1e-4)
    assert found > 1e-3


@pytest.mark.parametrize("rank", [1, 3])
def test_latent_values_are_the_best_of_their_rank(
    heads: HeadWeights, x: np.ndarray, read: np.ndarray, rank: int
) -> None:
    merged = latent_values(heads, moments_of(read, read, x), rank)
    wanted = head_values(heads, x)
    means = wanted.mean(axis=1, keepdims=True)
    out = np.einsum("tr,ord->otd", x @ merged.value + merged.value_bias, merged.output)
    found = square(wanted - means - out)
    # Side by side, heads are one matrix of outputs: the best latent is its best factor.
    side = (wanted - means).transpose(1, 0, 2).reshape(N, M * D)
    assert found == pytest.approx(best_by_search(side, x - x.mean(axis=0), np.eye(M * D), rank), rel=1e-4)
    np.testing.assert_allclose(merged.constant, means.sum(axis=(0, 1)), atol=1e-12)
    assert found > 1e-3


def test_the_spectra_say_what_each_rank_loses(heads: HeadWeights, x: np.ndarray) -> None:
    """Sums over heads and tokens (pairs of tokens) of the squared error are the tails of the spectra."""
    moments = moments_of(x)
    keys, values = spectra(heads, moments)
    wanted = head_values(heads, x) - head_values(heads, x).mean(axis=1, keepdims=True)
    for rank in range(1, D + 1):
        scores = merged_scores(latent_scores(heads, moments, rank), x)
        assert M * square(head_scores(heads, x) - scores) == pytest.approx(np.sum(keys[rank:] ** 2), abs=1e-9)
        merged = latent_values(heads, moments, rank)
        out = np.einsum("tr,ord->otd", x @ merged.value + merged.value_bias, merged.output)
        assert M * D * square(wanted - out) == pytest.approx(np.sum(values[rank:] ** 2), abs=1e-9)


def test_full_rank_is_exact(heads: HeadWeights, x: np.ndarray) -> None:
    moments = moments_of(x)
    np.testing.assert_allclose(
        merged_scores(low_rank_scores(heads, moments, D), x)[0], head_scores(heads, x).mean(axis=0), atol=1e-9
    )
    np.testing.assert_allclose(merged_scores(latent_scores(heads, moments, D), x), head_scores(heads, x), atol=1e-9)
    for merged in (low_rank_values(heads, moments, D), latent_values(heads, moments, D)):
        np.testing.assert_allclose(merged_values(merged, x).sum(axis=0), head_values(heads, x).sum(axis=0), atol=1e-9)


def test_the_covariance_here_is_singular(x: np.ndarray) -> None:
    assert np.linalg.matrix_rank(moments_of(x).key.covariance, tol=1e-9) == D - 1


def test_keys_and_values_are_white_and_centred(heads: HeadWeights, x: np.ndarray) -> None:
    moments = moments_of(x)
    for kernel, bias in (
        (lambda one: (one.key, one.key_bias))(latent_scores(heads, moments, 3)),
        (lambda one: (one.key, one.key_bias))(low_rank_scores(heads, moments, 2)),
        (lambda one: (one.value, one.value_bias))(latent_values(heads, moments, 3)),
        (lambda one: (one.value, one.value_bias))(low_rank_values(heads, moments, 3)),
    ):
        cached = x @ kernel + bias
        np.testing.assert_allclose(cached.mean(axis=0), 0, atol=1e-9)
        np.testing.assert_allclose(cached.T @ cached / N, np.eye(cached.shape[1]), atol=1e-8)


def test_ranks_nest(heads: HeadWeights, x: np.ndarray) -> None:
    moments = moments_of(x)
    whole, part = latent_scores(heads, moments, 4), latent_scores(heads, moments, 2)
    np.testing.assert_allclose(np.abs(whole.key[:, :2]), np.abs(part.key), atol=1e-9)
    values, few = latent_values(heads, moments, 4), latent_values(heads, moments, 2)
    np.testing.assert_allclose(np.abs(values.output[:, :2]), np.abs(few.output), atol=1e-9)


def attention(random: np.random.Generator) -> np.ndarray:
    raw = np.exp(2 * random.standard_normal((N, N)))
    return raw / raw.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("rank", [1, 3, D])
def test_fit_is_the_best_regression_of_its_rank(heads: HeadWeights, x: np.ndarray, rank: int) -> None:
    random = np.random.default_rng(4)
    own, shared = [attention(random) for _ in range(M)], attention(random)
    y = sum(each @ (x @ heads.value[:, h] + heads.value_bias[h]) @ heads.output[h] for h, each in enumerate(own))
    z = shared @ x
    centred = z - z.mean(axis=0), y - y.mean(axis=0)
    found = OutputMoments(z.mean(axis=0), y.mean(axis=0), centred[0].T @ centred[0] / N, centred[0].T @ centred[1] / N)
    merged = fitted_values(heads, found, moments_of(x), rank, ridge=1e-12)
    error = square(y - shared @ (x @ merged.value + merged.value_bias) @ merged.output[0] - merged.constant)
    if rank == D:
        exact = np.linalg.lstsq(np.concatenate([z, np.ones((N, 1))], axis=1), y, rcond=None)[0]
        assert error == pytest.approx(square(y - z @ exact[:-1] - exact[-1]), rel=1e-6)
    else:
        assert error == pytest.approx(best_by_search(centred[1], centred[0], np.eye(D), rank), rel=1e-5)
    # Where the shared attention is not the heads' own, the value path alone is a worse guess.
    plain = low_rank_values(heads, moments_of(x), rank)
    assert error < square(y - shared @ (x @ plain.value + plain.value_bias) @ plain.output[0] - plain.constant)


def test_fit_trusts_the_value_path_where_there_is_little_to_go_by(heads: HeadWeights, x: np.ndarray) -> None:
    nothing = OutputMoments(np.zeros(D), np.zeros(D), 1e-9 * np.eye(D), np.zeros((D, D)))
    merged = fitted_values(heads, nothing, moments_of(x), D, ridge=1e6)
    path = np.einsum("dmk,mke->de", heads.value, heads.output)
    np.testing.assert_allclose(merged.value @ merged.output[0], path, atol=1e-4)


def test_no_more_rank_than_there_is(heads: HeadWeights, x: np.ndarray) -> None:
    """Columns beyond the rank of what is kept are zeros, not amplified rounding."""
    random = np.random.default_rng(5)
    alike = np.broadcast_to(random.standard_normal((D, 1, 1)), heads.value.shape)
    merged = low_rank_values(dataclasses.replace(heads, value=alike), moments_of(x), 4)
    assert merged.output[:, :1].any()
    assert not merged.output[:, 1:].any()
    assert not merged.value[:, 1:].any()
    # Inputs sum to one number: values that only see the sum are constant, and nothing is left of them but that.
    constant = low_rank_values(dataclasses.replace(heads, value=np.ones_like(heads.value)), moments_of(x), 2)
    assert not constant.output.any()
    u, s, vt = svd(5, (np.zeros((3, 3)),), (np.eye(3),))
    assert u.shape == (3, 5)
    assert vt.shape == (5, 3)
    assert not s.any()
