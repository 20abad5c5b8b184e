"""Draws follow the distribution that temperature, top-k and top-p leave, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from chai_jax.errors import InputError
from chai_jax.serve.sample import Sampling, chances, nucleus, sample

PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.25, 0.15, 0.1, 0.03])
DRAWS = 4000


def draws(sampling: Sampling) -> np.ndarray:
    """How often each token comes up in `DRAWS` rows of one distribution."""
    logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (DRAWS, 1))
    tokens = sample(logits, jax.random.split(jax.random.key(0), DRAWS), sampling)
    return np.bincount(tokens, minlength=len(PROBABILITIES))


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 2.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(sample(logits, keys, Sampling.checked()), [1, 0])


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5, 6]),
        ({"temperature": 2.0, "top_k": 100}, [0, 1, 2, 3, 4, 5, 6]),
        ({"temperature": 1.0, "top_k": 0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"temperature": 1.0, "top_k": -1}, [0, 1, 2, 3, 4, 5, 6]),
        ({"temperature": 1.0, "top_k": 3}, [1, 3, 4]),
        ({"temperature": 1.0, "top_k": 1}, [1]),
        ({"temperature": 1.0, "top_p": 0.6}, [1, 3]),
        ({"temperature": 1.0, "top_p": 0.7}, [1, 3, 4]),
        ({"temperature": 1.0, "top_p": 1e-6}, [1]),
        # The nucleus is that of what top-k leaves: 0.5, 0.3125, 0.1875; of all tokens, 0.4 and 0.25 would not do.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [1, 3]),
    ],
)
def test_draws_follow_the_distribution(asked: dict[str, float], kept: list[int]) -> None:
    expected = np.zeros(len(PROBABILITIES))
    expected[kept] = PROBABILITIES[kept] ** (1 / asked["temperature"])
    counts = draws(Sampling.checked(**asked))
    assert not counts[expected == 0].any()
    assert (counts[kept] > 0).all()
    if len(kept) > 1:
        assert chisquare(counts[kept], DRAWS * expected[kept] / expected.sum()).pvalue > 0.001


@pytest.mark.parametrize(("top_p", "size"), [(0.3, 1), (0.45, 2), (0.76, 3), (0.97, 4), (1.0, 4)])
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(top_p: float, size: int) -> None:
    logits = jnp.log(jnp.array([[0.4, 0.35, 0.2, 0.05]]))
    np.testing.assert_array_equal(nucleus(logits, top_p)[0], np.arange(4) < size)


@pytest.mark.parametrize("no_limit", [{"top_k": 0}, {"top_k": -1}, {"top_p": 1.0}])
def test_a_limit_that_is_none_may_be_given_to_greedy_decoding(no_limit: dict[str, float]) -> None:
    assert Sampling.checked(0.0, **no_limit) == Sampling()


def test_a_row_depends_on_no_other_row() -> None:
    logits = jax.random.normal(jax.random.key(1), (6, 30))
    keys = jax.random.split(jax.random.key(2), 6)
    for sampling in (Sampling.checked(1.0), Sampling.checked(1.0, top_k=5, top_p=0.9)):
        together = sample(logits, keys, sampling)
        alone = [sample(logits[row : row + 1], keys[row : row + 1], sampling)[0] for row in range(6)]
        np.testing.assert_array_equal(together, alone)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = 50 * jax.random.normal(jax.random.key(1), (4, 30))
    keys = jax.random.split(jax.random.key(2), 4)
    np.testing.assert_array_equal(sample(logits, keys, Sampling.checked(1e-30)), jnp.argmax(logits, axis=-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (7, 1.0), (40, 0.5), (10_000, 0.9), (10_000, 1e-4)])
def test_limits_keep_what_a_sort_keeps(top_k: int, top_p: float) -> None:
    """Sorted, cut behind the k-th, renormalised, cut behind the first that fills `top_p`: in numpy, in float64."""
    logits = 3 * jax.random.normal(jax.random.key(4), (5, 1000))
    found = np.isfinite(chances(logits, Sampling.checked(0.7, top_k, top_p)))
    for row, kept in zip(np.asarray(logits, np.float64) / 0.7, found, strict=True):
        order = np.argsort(-row)[:top_k]
        mass = np.exp(row[order] - row.max())
        before = np.cumsum(mass / mass.sum()) - mass / mass.sum()
        assert set(np.flatnonzero(kept)) == set(order[before < top_p] if top_p < 1 else order)


def test_what_a_request_asks_is_not_compiled_anew() -> None:
    traces = []

    @jax.jit
    def draw(sampling: Sampling) -> jax.Array:
        traces.append(sampling)
        return sample(jnp.zeros((1, 4)), jax.random.split(jax.random.key(0), 1), sampling)

    for asked in ((0.5, None, 0.9), (0.7, 3, 0.8), (1.0, 2, None), (1.0, None, None)):
        draw(Sampling.checked(*asked))
    assert len(traces) == 1
    draw(Sampling.checked())
    assert len(traces) == 2  # greedy programs have no room for what drawing needs


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1.0, "top_k": -2}, "top_k is -2"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 5}, "greedy"),
        ({"top_p": 0.9}, "greedy"),
    ],
)
def test_refuses_what_means_nothing(asked: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling.checked(**asked)
