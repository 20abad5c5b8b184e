"""A model as a Flax NNX module: the same numbers, and NNX's own tools work on it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from chai_jax import from_flax, to_flax
from chai_jax.adapt.step import join, split
from chai_jax.compress.quantize import store_weights
from chai_jax.model.decoder import forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.flax_module import FlaxModel, QuantizedVariable
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import is_leaf
from chai_jax.model.sharding import Layout, make_mesh
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec, group_clusters

CONFIG = Architecture(48, 16, 2, 4, 32, 16, embed_dim=8, pre_norm=False)
PAIRS = ((0, 3), (1, 2))
SPEC = Spec(
    (
        Spec.dense(1, 4, 4, "int8").layers[0],
        LayerSpec("qkv", PAIRS, group_clusters("qkv", PAIRS, ("float32",) * 2), 4, 4),
    )
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(4, 48, (4, 9), np.int32))
MASK = jnp.asarray(np.arange(9) >= np.array([[0], [3], [0], [5]]))
Draw = Callable[[Architecture, Spec, float], Params]


@pytest.fixture
def model(random_params: Draw) -> Model:
    """Dense and clustered, with projections in and out; on four by two devices."""
    how = Execution.choose("float32", Layout(make_mesh(4, 2)))
    return Model(CONFIG, SPEC, random_params(CONFIG, SPEC, 0.3), execution=how)


@pytest.fixture
def quantized(model: Model) -> Model:
    """The same, its second layer's matrices in int8."""
    layers = model.params["layers"]
    return model.replace(params={**model.params, "layers": {**layers, "1": store_weights(layers["1"], "int8")}})


def loss_of_logits(logits: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, padding or not."""
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logprobs, TOKENS[:, 1:, None], axis=-1).mean()


def loss(module: FlaxModel) -> jax.Array:
    return loss_of_logits(module(TOKENS, MASK))


def values(state: nnx.State) -> Params:
    """The arrays of a module's state, as in `Model.params`."""
    return nnx.to_pure_dict(state)["params"]


def assert_same(found: object, expected: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_logits_are_the_models(model: Model, quantized: Model) -> None:
    call = nnx.jit(lambda module, tokens, mask: module(tokens, mask))
    for each in (model, quantized):
        assert_same(call(to_flax(each), TOKENS, MASK), each(TOKENS, MASK))
    assert_same(to_flax(model)(TOKENS[:1]).argmax(-1), model(TOKENS[:1]).argmax(-1))  # without a mask


def test_a_module_splits_and_merges_and_its_leaves_are_where_the_models_are(quantized: Model) -> None:
    module = to_flax(quantized)
    graph, trained, rest = nnx.split(module, nnx.Param, ...)
    for state, chosen in ((trained, nnx.Param), (rest, QuantizedVariable)):
        held = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        assert {type(variable) for variable in held} == {chosen}
    kernel = rest["params"]["layers"]["1"]["up"]["kernel"].get_value()
    assert kernel.values is quantized.params["layers"]["1"]["up"]["kernel"].values
    again = nnx.merge(graph, trained, rest)
    assert_same(again(TOKENS, MASK), module(TOKENS, MASK))
    assert_same(values(nnx.state(module)), quantized.params)


@pytest.mark.slow
def test_gradients_are_those_of_the_tree(model: Model) -> None:
    found = nnx.jit(nnx.value_and_grad(loss))(to_flax(model))

    def of_tree(params: Params) -> jax.Array:
        hidden = forward(CONFIG, SPEC, params, TOKENS, MASK, model.how).hidden
        return loss_of_logits(unembed(CONFIG, params, hidden, model.how))

    expected = jax.jit(jax.value_and_grad(of_tree))(model.params)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6), values(found[1]), expected[1])
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1])) > 1e-2


def test_an_update_is_optaxs_and_leaves_what_is_quantized(quantized: Model) -> None:
    module, tx = to_flax(quantized), optax.sgd(0.1)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step(module: FlaxModel, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradient = nnx.value_and_grad(loss)(module)
        optimizer.update(module, gradient)
        return value

    before = step(module, optimizer)
    found = from_flax(module, quantized)
    assert (found.config, found.spec, found.execution) == (CONFIG, SPEC, quantized.execution)

    def of_tree(trained: Any) -> jax.Array:
        return loss(to_flax(quantized.replace(params=join(trained, frozen))))

    trained, frozen = split(quantized.params, jax.tree.map(lambda x: not is_leaf(x), quantized.params, is_leaf=is_leaf))
    expected = jax.tree.map(lambda x, g: x - 0.1 * g, trained, jax.jit(jax.grad(of_tree))(trained))
    same = partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(same, found.params, join(expected, frozen))
    assert loss(module) < before
    assert_same(quantized(TOKENS, MASK), to_flax(quantized)(TOKENS, MASK))  # the model it was made of is as before


def test_updates_of_nnx_reach_the_model(model: Model) -> None:
    module = to_flax(model)
    nnx.update(module, jax.tree.map(lambda x: 2 * x, nnx.state(module)))
    assert_same(from_flax(module, model).params, jax.tree.map(lambda x: 2 * x, model.params))


def test_shardings_of_nnx_are_the_layouts(quantized: Model) -> None:
    layout, module = quantized.how.layout, to_flax(quantized)
    state = nnx.state(module)
    specs = values(nnx.get_partition_spec(state))
    assert specs["layers"]["0"]["up"]["kernel"] == P(None, "model")
    assert specs["layers"]["0"]["query"]["kernel"] == P(None, "model", None)
    assert specs["embed"]["tokens"] == P("model", None)
    wanted = layout.shardings(CONFIG, SPEC)["layers"]["0"]
    assert values(nnx.get_named_sharding(state, layout.mesh))["layers"]["0"] == wanted

    @nnx.jit
    def place(module: FlaxModel) -> None:
        state = nnx.state(module)
        nnx.update(module, jax.lax.with_sharding_constraint(state, nnx.get_named_sharding(state, layout.mesh)))

    expected = module(TOKENS, MASK)
    place(module)
    kernel = module.params["layers"]["0"]["up"]["kernel"].get_value()
    assert kernel.sharding.is_equivalent_to(wanted["up"]["kernel"], 2)
    assert kernel.addressable_shards[0].data.shape == (16, 16)
    np.testing.assert_allclose(module(TOKENS, MASK), expected, atol=1e-5)
