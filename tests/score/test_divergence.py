"""The divergence of known distributions, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.score.divergence import kl_divergence


def test_known_answers() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3; the other way round 1/4 ln 1/2 + 3/4 ln 3/2."""
    even, uneven = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    first = jnp.stack([even, uneven, even])
    second = jnp.stack([uneven, even, even])
    expected = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.25 * np.log(1 / 2) + 0.75 * np.log(3 / 2), 0]
    np.testing.assert_allclose(kl_divergence(first, second), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
def test_it_is_never_negative_and_keeps_the_leading_axes(shape: tuple[int, ...]) -> None:
    first, second = (jax.nn.log_softmax(jax.random.normal(jax.random.key(at), shape)) for at in range(2))
    found = kl_divergence(first, second)
    assert found.shape == shape[:-1]
    assert bool((found > 0).all())
