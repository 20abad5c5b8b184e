"""Random parameters of any spec, every leaf random; the kernels of CPUs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model.execution import Execution
from chai_jax.model.kernels import products_cpu
from chai_jax.model.params import Declared, Params, declare
from chai_jax.model.sharding import one_device
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec


@pytest.fixture(scope="session")
def random_params() -> Callable[[Architecture, Spec, float], Params]:
    """Drawn by numpy, which compiles nothing; norms around 1, and no bias is zero, so that none can be forgotten."""

    def draw(config: Architecture, spec: Spec, std: float) -> Params:
        random = np.random.default_rng(0)

        def leaf(declared: Declared) -> jax.Array:
            centre = 1.0 if declared.kind == "scale" else 0.0
            return jnp.asarray(centre + std * random.standard_normal(declared.shape), jnp.float32)

        return jax.tree.map(leaf, declare(config, spec), is_leaf=lambda x: isinstance(x, Declared))

    return draw


@pytest.fixture
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small they are, products are the kernels'."""
    monkeypatch.setattr(products_cpu, "LEAST", 1)


@pytest.fixture
def native() -> Execution:
    """One CPU and its kernels, which are compiled and known to XLA then."""
    return Execution.choose("float32", one_device(), "native")


@pytest.fixture(scope="session")
def normal() -> Callable[..., jax.Array]:
    """Arrays of a shape and dtype, with a mean, so that what is left out does not average out."""

    def draw(*shape: int, dtype: str = "float32") -> jax.Array:
        spread = 20 if dtype == "int8" else 1
        return jnp.asarray(1 + spread * np.random.default_rng(sum(shape)).standard_normal(shape), dtype)

    return draw
