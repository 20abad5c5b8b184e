"""What an error of a key costs, against the derivative of the layer's output; the basis that follows from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.compress import key_basis
from chai_jax.compress.key_basis import EVERY, find_basis
from chai_jax.model.layerwise import embed_text, how_in_float32
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.model.rotary import rotate, turns
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.spec import Spec

OPT = Architecture(67, 32, 1, 4, 48, 256, 32)
LLAMA = dataclasses.replace(
    OPT, activation="silu", norm="rms", gated=True, position_offset=0, bias=False, num_kv_heads=2, rotary=Rotary()
)
LLAMA = dataclasses.replace(LLAMA, family="llama")
TOKENS = np.random.default_rng(0).integers(3, 60, (2, 100)).astype(np.int32)
MASK = np.arange(100) < np.array([[100], [91]])


@pytest.mark.parametrize(
    "config", [pytest.param(LLAMA, id="llama"), pytest.param(OPT, id="opt", marks=pytest.mark.slow)]
)
def test_what_an_error_of_a_key_costs(config: Architecture) -> None:
    """The matrix is the sum of squares of the output's derivative by keys before their rotation: of rows that read the
    key from few bits, for every so many of them."""
    spec = Spec.of(config)
    model = Model(config, spec, init(config, spec, jax.random.key(0), 0.3))
    how, layer, params = how_in_float32(model), spec.layers[0], model.params["layers"]["0"]
    x = embed_text(model, jnp.asarray(TOKENS), jnp.asarray(MASK))
    found = key_basis.key_moments(config, layer, how, params, x, jnp.asarray(MASK))
    assert float(found["count"]) == (100 - 4) + (91 - 4)

    _, key, value, query = key_basis.observed(config, layer, how, params, x, jnp.asarray(MASK))
    kernel = params["output"]["kernel"].reshape(*query.shape[1:3], -1, config.hidden_size)
    positions = jnp.arange(100)

    def output(key: jax.Array, row: int) -> jax.Array:
        """What each query of every key adds to every so many rows of one sequence, [T', q, D]."""
        if config.rotary is not None:
            key = rotate(key[None], positions[None], *turns(config.rotary, config.head_dim))[0]
        scores = jnp.einsum("cqtr,csr->cqts", query[row, :, :, ::EVERY], key) * config.head_dim**-0.5
        scores = jnp.where(positions[::EVERY, None] >= positions, scores, -1e30)
        return jnp.einsum("cqts,csr,cqrd->tqd", jax.nn.softmax(scores), value[row], kernel)

    expected = np.zeros(found["asked"].shape)
    for row in range(2):
        slope = np.asarray(jax.jacrev(output)(key[row], row), np.float64)  # [T', q, D, C, S, R]
        reads = MASK[row, ::EVERY, None] & MASK[row] & (positions[::EVERY, None] // 64 != positions // 64)
        slope *= np.asarray(reads & (positions >= 4))[:, None, None, None, :, None]
        expected += np.einsum("tqdcsr,tqdcsp->crp", slope, slope, optimize=True)
    np.testing.assert_allclose(found["asked"] / config.head_dim, expected, rtol=2e-3, atol=2e-3 * expected.max())


def test_coordinates_are_uncorrelated_and_all_errors_weigh_alike() -> None:
    spec = Spec.of(LLAMA)
    model = Model(LLAMA, spec, init(LLAMA, spec, jax.random.key(0), 0.3))
    how, layer, params = how_in_float32(model), spec.layers[0], model.params["layers"]["0"]
    x = embed_text(model, jnp.asarray(TOKENS), jnp.asarray(MASK))
    basis = find_basis(LLAMA, layer, how, params, x, MASK)
    moments = jax.device_get(key_basis.key_moments(LLAMA, layer, how, params, x, jnp.asarray(MASK)))
    mean = moments["key"] / moments["count"]
    np.testing.assert_allclose(basis.mean, mean, atol=1e-5)
    for head in range(2):
        into, back = (part[head].astype(np.float64) for part in (basis.into, basis.back))
        np.testing.assert_allclose(into @ back, np.eye(8), atol=1e-4)
        covariance = moments["pairs"][head] / moments["count"] - np.outer(mean[head], mean[head])
        inside = into.T @ covariance @ into
        np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=2e-4 * inside.max())
        assert (np.diff(np.diag(inside)) <= 1e-6).all()
        # An error of a coordinate is an error `back` of the key, and costs back M back': the same for all.
        cost = back @ moments["asked"][head] @ back.T
        np.testing.assert_allclose(cost / np.trace(cost) * 8, np.eye(8), atol=2e-2)
    # Without bits a coordinate's error is its variance, and more bits leave less.
    assert (np.diff(basis.error, axis=0) < 0).all()
