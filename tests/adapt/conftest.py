"""A tiny OPT that compiles in a second or two, and examples whose answers differ in length."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.compress.quantize import store_weights
from chai_jax.data.batches import Encoded
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.model.params import Declared, declare
from chai_jax.model.sharding import Layout, make_mesh
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

CONFIG = Architecture(
    vocab_size=53, hidden_size=16, num_layers=1, num_heads=2, ffn_dim=32, max_positions=32, embed_dim=16
)


@pytest.fixture(scope="session")
def tiny(one_device: Layout) -> Callable[..., Model]:
    """`tiny(seed, dtype, int8=layers, int4=layers, storage, layout, **config)`: a random model, on one device if no
    layout is given."""

    def build(
        seed: int = 0,
        dtype: Any = jnp.float32,
        int8: tuple[int, ...] = (),
        int4: tuple[int, ...] = (),
        storage: str = "float32",
        layout: Layout | None = None,
        **changes: Any,
    ) -> Model:
        config = dataclasses.replace(CONFIG, **changes)
        spec = Spec.of(config, storage)
        random = np.random.default_rng(seed)

        def leaf(what: Declared) -> jax.Array:
            return jnp.asarray((what.kind == "scale") + 0.3 * random.standard_normal(what.shape), dtype)

        params = jax.tree.map(leaf, declare(config, spec), is_leaf=lambda x: isinstance(x, Declared))
        for layer, weights in (*((at, "int8") for at in int8), *((at, "int4") for at in int4)):
            params["layers"][str(layer)] = store_weights(params["layers"][str(layer)], weights)
        how = Execution.choose(layout=layout or one_device)
        return Model(config, spec, params, execution=how)

    return build


@pytest.fixture(scope="session")
def examples() -> list[Encoded]:
    """Sixteen; answers of 1 to 6 tokens, inputs of at most 16."""
    random = np.random.default_rng(0)
    shapes = [(int(length), int(length - random.integers(1, min(length, 7)))) for length in random.integers(3, 18, 16)]
    return [Encoded(tuple(random.integers(4, 53, length).tolist()), start) for length, start in shapes]


@pytest.fixture(scope="session")
def one_device() -> Layout:
    return Layout(make_mesh(data=1))
