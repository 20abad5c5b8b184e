"""Moments of a layer's input against what errors of keys and values really do to the layer's output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.compress.moments import input_moments
from chai_jax.model.layerwise import embed_text, how_in_float32, seen_through
from chai_jax.model.model import Model
from chai_jax.model.params import Params, init
from chai_jax.model.self_attention import Seen
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from tests.compress.test_key_basis import LLAMA, OPT

WIDTH, QUERIES, RANK = 32, 4, 8
TOKENS = np.random.default_rng(0).integers(3, 60, (11, 12)).astype(np.int32)  # a batch and a part of one
MASK = np.arange(12) < np.array([12, 9, 12, 12, 2, 12, 12, 12, 5, 12, 12])[:, None]
CONFIGS = pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])


def layer_of(config: Architecture) -> tuple[Model, Params, jax.Array]:
    """A layer whose attention is far from even, and what enters it."""
    spec = Spec.of(config)
    model = Model(config, spec, init(config, spec, jax.random.key(0), 0.3))
    return model, model.params["layers"]["0"], embed_text(model, jnp.asarray(TOKENS), jnp.asarray(MASK))


def seen_of(model: Model, params: Params, x: jax.Array) -> Seen:
    return seen_through(model.config, model.spec.layers[0], how_in_float32(model), params, x, jnp.asarray(MASK))[1]


@CONFIGS
def test_values_count_by_what_their_errors_do(config: Architecture) -> None:
    """Values are changed token by token at random: how much heads' outputs move on average is what the moments say.

    Of signs that are independent and fair, the mean over all choices is the sum over tokens, each changed alone.
    """
    model, params, x = layer_of(config)
    found = input_moments(config, model.spec.layers[0], how_in_float32(model), params, x, MASK).value.joint
    seen = seen_of(model, params, x)
    attention, change = np.asarray(seen.probabilities, np.float64), np.random.default_rng(1).standard_normal((33, RANK))
    moved = counted = 0.0
    for row, mask in enumerate(MASK):
        for token in np.flatnonzero(mask):
            error = np.append(np.asarray(seen.x[row, token], np.float64), 1) @ change
            mixed = attention[row][:, mask, token, None] * error  # of each head and query
            moved += np.square(mixed).sum()
            counted += np.square(attention[row][:, mask, token]).sum()
    assert np.trace(change.T @ found @ change) == pytest.approx(moved / counted, rel=1e-4)
    assert found[-1, -1] == pytest.approx(1)


@CONFIGS
def test_keys_count_by_what_their_scores_do(config: Architecture) -> None:
    """A token's weight is the sum of squares of the output's derivative by all scores of its key."""
    model, params, x = layer_of(config)
    found = input_moments(config, model.spec.layers[0], how_in_float32(model), params, x, MASK)
    seen = seen_of(model, params, x)
    value = jnp.einsum("bsd,dcr->bcsr", seen.x, params["value"]["kernel"])
    value = jnp.repeat(value + params["value"].get("bias", jnp.zeros(RANK))[..., None, :], QUERIES // value.shape[1], 1)

    def output(scores: jax.Array, row: int) -> jax.Array:
        attention = jax.nn.softmax(jnp.where(jnp.tri(12, dtype=bool), scores, -1e30))
        return jnp.einsum("hts,hsr,hrd->td", attention, value[row], params["output"]["kernel"])

    total, uniform = np.zeros((2, WIDTH + 1, WIDTH + 1))
    for row, mask in enumerate(MASK):
        slope = np.asarray(jax.jacrev(output)(seen.scores[row], row), np.float64)[mask]  # [t, D, h, t, s]
        weights = np.square(slope).sum(axis=(0, 1, 2, 3))
        for s in np.flatnonzero(mask):
            token = np.append(np.asarray(seen.x[row, s], np.float64), 1)
            total += weights[s] * np.outer(token, token)
            uniform += np.outer(token, token)
    np.testing.assert_allclose(found.key.joint, total / total[-1, -1], atol=1e-4)
    np.testing.assert_allclose(found.query.joint, uniform / MASK.sum(), atol=1e-5)
    assert np.abs(found.key.joint - found.query.joint).max() > 0.1  # or the test could not tell


def test_where_no_score_matters_all_keys_count_alike() -> None:
    model, params, x = layer_of(OPT)
    silent = {**params, "output": {**params["output"], "kernel": jnp.zeros_like(params["output"]["kernel"])}}
    found = input_moments(OPT, model.spec.layers[0], how_in_float32(model), silent, x, MASK)
    np.testing.assert_array_equal(found.key.joint, found.query.joint)
