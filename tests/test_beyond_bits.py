"""What further methods could save: the estimates are the known answers where those are known."""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def beyond(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("beyond_bits")


def moments(*parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over both halves of the rows."""
    z = np.concatenate([np.ones((len(parts[0]), 1)), *parts], axis=1)
    half = len(z) // 2
    return z[:half].T @ z[:half] / half, z[half:].T @ z[half:] / half


def test_bits_saved_are_half_the_log_of_what_is_left(beyond: ModuleType) -> None:
    """y = 2 x + 1 + noise of a quarter of its deviation: two bits a number; a stranger saves none."""
    random = np.random.default_rng(0)
    y = random.normal(size=(40_000, 3))
    noisy = y + random.normal(size=y.shape) / np.sqrt(15)  # leaves 1/16 of the variance
    stranger = random.normal(size=y.shape)
    both = moments(y, 2 * noisy + 1, stranger)
    wanted, known, other = slice(1, 4), slice(4, 7), slice(7, 10)
    assert beyond.best(both, wanted, [], known) == pytest.approx(2.0, abs=0.02)
    assert beyond.best(both, wanted, [], other) == pytest.approx(0.0, abs=0.001)
    assert beyond.best(both, wanted, [known], other) == pytest.approx(0.0, abs=0.001)


def test_moments_of_halves_count_what_counts(beyond: ModuleType) -> None:
    random = np.random.default_rng(1)
    z = random.normal(size=(6, 5, 2)).astype(np.float32)
    counts = random.random((6, 5)) < 0.7
    found = beyond.halves([jnp.asarray(z[..., :1]), jnp.asarray(z[..., 1:])], jnp.asarray(counts))
    for half, some in zip(found, (slice(3), slice(3, None)), strict=True):
        rows = z[some][counts[some]]
        rows = np.concatenate([np.ones((len(rows), 1)), rows], axis=1)
        np.testing.assert_allclose(half, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_an_error_that_is_a_map_of_what_is_mixed_can_be_refitted(beyond: ModuleType) -> None:
    random = np.random.default_rng(2)
    old, kernel = random.normal(size=(4000, 4)), random.normal(size=(4, 7))
    halved = old / 2 + 1
    assert beyond.refitted(moments(halved - old, halved), kernel) < 1e-6
    noise = 0.1 * random.normal(size=old.shape)
    assert beyond.refitted(moments(noise, old + noise), kernel) == pytest.approx(1.0, abs=0.02)


def test_feedback_is_worth_what_its_weights_are_correlated(beyond: ModuleType) -> None:
    """Two numbers of correlation c: tr(D) / tr(H) = (1 + 1 - c^2) / 2, turned by Hadamard's matrix or not."""
    config = SimpleNamespace(kv_heads=1, head_dim=2)
    turn = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
    for correlation in (0.0, 0.6):
        weight = np.array([[1.0, correlation], [correlation, 1.0]])
        kernel = turn.T @ np.linalg.cholesky(weight)
        found = beyond.feedback(config, {"output": {"kernel": jnp.asarray(kernel[None], jnp.float32)}})
        assert found == pytest.approx(1 - correlation**2 / 2, rel=1e-5)
