"""One matmul for queries, keys and values computes what three do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model.decoder import forward
from chai_jax.model.execution import Execution
from chai_jax.model.params import Params, fold_projections
from chai_jax.model.quantized import QuantizedArray, quantize_int4, quantize_int8
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec, group_clusters

CONFIG = Architecture(
    vocab_size=61, hidden_size=24, num_layers=4, num_heads=6, ffn_dim=40, max_positions=32, embed_dim=24
)
HOW = Execution.choose("float32")
Draw = Callable[[Architecture, Spec, float], Params]
PAIRS = ((0, 3), (1, 4), (2, 5))
DENSE = Spec.dense(1, 6, 4).layers[0]


def layer(share: str, rank: int) -> LayerSpec:
    return LayerSpec(share, PAIRS, group_clusters(share, PAIRS, ("float32",) * 3), rank, rank)


SPEC = Spec((DENSE, layer("qk", 4), layer("qkv", 4), layer("kv", 7)))


def hidden(config: Architecture, params: Params) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(4, 61, (2, 9), np.int32)
    run = jax.jit(forward, static_argnums=(0, 1), static_argnames="how")
    return np.asarray(run(config, SPEC, params, jnp.asarray(tokens), jnp.ones((2, 9), bool), how=HOW).hidden)


def with_kernels(params: Params, change: Callable[[Any], Any]) -> Params:
    layers = {
        index: {
            name: leaf | {"kernel": change(leaf["kernel"])} if name in ("query", "key", "value") else leaf
            for name, leaf in old.items()
        }
        for index, old in params["layers"].items()
    }
    return params | {"layers": layers}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", ["float32", "int8"])
def test_folded_equals_apart(random_params: Draw, bias: bool, kernel: str) -> None:
    config = dataclasses.replace(CONFIG, bias=bias)
    params = random_params(config, SPEC, 0.2)
    if kernel == "int8":
        params = with_kernels(params, lambda x: quantize_int8(x, axes=(-3,), scale_dtype=jnp.float32))
    folded = fold_projections(params)
    for index, each in folded["layers"].items():
        assert {"query", "key", "value"}.isdisjoint(each), index
        assert isinstance(each["qkv"]["kernel"], QuantizedArray) == (kernel == "int8")
        assert ("bias" in each["qkv"]) == bias
    np.testing.assert_allclose(hidden(config, folded), hidden(config, params), atol=1e-5)
    assert sum(x.nbytes for x in jax.tree.leaves(folded)) == sum(x.nbytes for x in jax.tree.leaves(params))


def test_what_cannot_be_folded_stays(random_params: Draw) -> None:
    params = random_params(CONFIG, SPEC, 0.2)
    int4 = with_kernels(params, lambda x: quantize_int4(x, axis=-3, group=8))
    assert jax.tree.structure(fold_projections(int4)) == jax.tree.structure(int4)
    np.testing.assert_array_equal(hidden(CONFIG, fold_projections(int4)), hidden(CONFIG, int4))
