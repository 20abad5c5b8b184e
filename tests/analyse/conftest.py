"""A small random model whose attention is far from uniform, and windows of random tokens."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest

from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

PRE = Architecture(64, 48, 3, 6, 64, 24, 48)


@pytest.fixture(params=["pre-norm", "post-norm"])
def config(request: pytest.FixtureRequest) -> Architecture:
    """Three layers of six heads; OPT's two ways to place norms and to embed."""
    return PRE if request.param == "pre-norm" else dataclasses.replace(PRE, pre_norm=False, embed_dim=16)


@pytest.fixture
def make() -> Callable[..., Model]:
    """`make(config=PRE)`: a random dense model whose biases are not zero."""

    def make(config: Architecture = PRE) -> Model:
        spec = Spec.of(config)
        params = init(config, spec, jax.random.key(0), std=0.3)
        noise = jax.random.normal(jax.random.key(1), (10_000,))

        def shift(leaf: jax.Array) -> jax.Array:
            return leaf + 0.1 * noise[: leaf.size].reshape(leaf.shape) if leaf.ndim < 3 else leaf

        return Model(config, spec, jax.tree.map(shift, params))

    return make


@pytest.fixture
def windows() -> list[list[int]]:
    """Seven windows of 3 to 16 tokens."""
    random = np.random.default_rng(0)
    return [[2, *random.integers(4, 64, length - 1).tolist()] for length in (16, 3, 9, 12, 16, 5, 14)]
