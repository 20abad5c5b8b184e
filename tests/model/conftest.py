"""Random parameters of any spec, every leaf random."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model.params import Declared, OPTConfig, Params, declare
from chai_jax.spec import Spec


@pytest.fixture(scope="session")
def random_params() -> Callable[[OPTConfig, Spec, float], Params]:
    """Drawn by numpy, which compiles nothing; norms around 1, and no bias is zero, so that none can be forgotten."""

    def draw(config: OPTConfig, spec: Spec, std: float) -> Params:
        random = np.random.default_rng(0)

        def leaf(declared: Declared) -> jax.Array:
            centre = 1.0 if declared.kind == "scale" else 0.0
            return jnp.asarray(centre + std * random.standard_normal(declared.shape), jnp.float32)

        return jax.tree.map(leaf, declare(config, spec), is_leaf=lambda x: isinstance(x, Declared))

    return draw
