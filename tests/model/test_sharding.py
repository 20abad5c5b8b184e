"""The sharding table: what is split, what stays whole, and that neither changes a result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from chai_jax.errors import InputError
from chai_jax.model.decoder import forward
from chai_jax.model.execution import Execution
from chai_jax.model.params import Declared, declare
from chai_jax.model.quantized import QuantizedArray, dequantize, quantize_int4, quantize_int8
from chai_jax.model.sharding import (
    FSDP,
    TABLE,
    Layout,
    make_mesh,
    partition_spec,
    place,
    shardings,
    whole,
)
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

CONFIG = Architecture(
    vocab_size=48, hidden_size=16, num_layers=1, num_heads=4, ffn_dim=32, max_positions=16, embed_dim=16
)
SPEC = Spec.dense(1, 4, 4)


def test_mesh_takes_all_devices_or_those_asked_for() -> None:
    assert dict(make_mesh().shape) == {"data": 8, "model": 1}
    assert dict(make_mesh(model=4).shape) == {"data": 2, "model": 4}
    assert dict(make_mesh(data=3, model=2).shape) == {"data": 3, "model": 2}


@pytest.mark.parametrize(("data", "model"), [(9, 1), (4, 4), (0, 1), (-1, -1), (None, 3), (None, 0)])
def test_mesh_refuses_what_does_not_fit(data: int | None, model: int) -> None:
    with pytest.raises(InputError, match="8 devices"):
        make_mesh(data, model)


def test_axes_are_split_by_the_table() -> None:
    found = shardings(declare(CONFIG, SPEC), make_mesh(model=4))
    layer = found["layers"]["0"]
    assert layer["query"]["kernel"].spec == P(None, "model", None)
    assert layer["query"]["bias"].spec == P("model", None)
    assert layer["output"]["kernel"].spec == P("model", None, None)
    assert layer["output"]["bias"].spec == P(None)
    assert layer["down"]["kernel"].spec == P("model", None)
    assert found["embed"]["tokens"].spec == P("model", None)
    assert found["embed"]["positions"].spec == P(None, None)


def test_an_axis_that_does_not_divide_stays_whole() -> None:
    mesh = make_mesh(model=4)
    assert partition_spec(("width", "heads", "rank"), (16, 6, 4), mesh) == P(None, None, None)
    assert partition_spec(("batch", "heads"), (4, 8), mesh) == P("data", "model")
    assert partition_spec(("batch", "heads"), (3, 8), mesh) == P(None, "model")


def test_fsdp_splits_every_large_array_over_data() -> None:
    found = shardings(declare(CONFIG, SPEC), make_mesh(data=4, model=2), FSDP)
    layer = found["layers"]["0"]
    assert layer["query"]["kernel"].spec == P("data", "model", None)
    assert layer["output"]["kernel"].spec == P("model", None, "data")
    assert layer["up"]["kernel"].spec == P("data", "model")
    assert layer["down"]["kernel"].spec == P("model", "data")
    assert found["embed"]["tokens"].spec == P(("model", "data"), None)


def test_as_many_mesh_axes_as_divide() -> None:
    mesh = make_mesh(data=4, model=2)
    assert partition_spec(("vocab", "embed"), (50272, 8), mesh, FSDP) == P(("model", "data"), None)
    assert partition_spec(("vocab", "embed"), (50266, 8), mesh, FSDP) == P("model", None)
    assert partition_spec(("vocab", "embed"), (50265, 8), mesh, FSDP) == P(None, None)
    assert partition_spec(("width", "heads", "rank"), (18, 3, 4), mesh, FSDP) == P(None, None, None)


def test_refuses_collisions_and_unknown_axes() -> None:
    with pytest.raises(ValueError, match="two of the axes"):
        partition_spec(("width", "ffn"), (16, 32), make_mesh(model=4), {**TABLE, "width": "model"})
    with pytest.raises(ValueError, match="two of the axes"):
        partition_spec(("vocab", "width"), (48, 16), make_mesh(model=4), FSDP)
    with pytest.raises(ValueError, match="no axis 'colour'"):
        partition_spec(("colour",), (16,), make_mesh())


def test_every_declared_axis_is_in_the_table() -> None:
    wide = Architecture(48, 16, 1, 4, 32, 16, embed_dim=8, pre_norm=False, tied=False)
    leaves = jax.tree.leaves(declare(wide, SPEC), is_leaf=lambda leaf: isinstance(leaf, Declared))
    for table in (TABLE, FSDP):
        assert {axis for leaf in leaves for axis in leaf.axes} <= set(table)
        assert len(jax.tree.leaves(shardings(declare(wide, SPEC), make_mesh(model=2), table))) == len(leaves)


def test_a_batch_that_does_not_divide_is_on_every_device() -> None:
    layout = Layout(make_mesh(data=4, model=2))
    for rows, spec in ((8, P("data")), (6, P(None)), (1, P(None))):
        batch = layout.rows({"tokens": np.arange(rows * 3).reshape(rows, 3)})["tokens"]
        assert batch.sharding.is_equivalent_to(jax.NamedSharding(layout.mesh, spec), 2)
        np.testing.assert_array_equal(whole(batch), np.arange(rows * 3).reshape(rows, 3))


def test_a_process_alone_has_every_row() -> None:
    layout = Layout(make_mesh(data=4, model=2))
    assert layout.share(8) == list(range(8))
    batch = layout.join(np.arange(48).reshape(2, 8, 3), 8)
    assert batch.sharding.spec == P(None, "data")
    np.testing.assert_array_equal(batch, np.arange(48).reshape(2, 8, 3))


@pytest.mark.parametrize(
    ("shape", "axes", "spec", "scale"),
    [((16, 4, 4), (-3,), P(None, "model"), P("model", None)), ((4, 4, 16), (-3, -2), P("model"), P(None))],
)
def test_a_scale_is_split_with_its_values(shape: tuple[int, ...], axes: tuple[int, ...], spec: P, scale: P) -> None:
    array = quantize_int8(jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32), axes)
    mesh = make_mesh(model=4)
    placed = place({"kernel": array}, {"kernel": jax.NamedSharding(mesh, spec)})["kernel"]
    assert isinstance(placed, QuantizedArray)
    assert placed.values.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), len(shape))
    assert placed.scale.sharding.spec == scale
    np.testing.assert_array_equal(dequantize(placed), dequantize(array))


@pytest.mark.parametrize(
    ("group", "wanted", "split"),
    [
        (4, P("model", None), P(None, None)),
        (2, P("model", None), P("model", None)),
        (2, P(("data", "model"), None), P(None, None)),
    ],
)
def test_int4_is_split_where_groups_are_whole(group: int, wanted: P, split: P) -> None:
    array = quantize_int4(jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32), -2, group)
    target = jax.NamedSharding(make_mesh(model=4), wanted)
    placed = place({"kernel": array}, {"kernel": target})["kernel"]
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(placed)} == {split}
    np.testing.assert_array_equal(dequantize(placed), dequantize(array))


@pytest.mark.parametrize("model", [1, 2])
def test_forward_is_the_same_on_eight_devices(model: int) -> None:
    random = np.random.default_rng(0)
    declared = declare(CONFIG, SPEC)
    params = jax.tree.map(
        lambda what: jnp.asarray(0.3 * random.standard_normal(what.shape), jnp.float32),
        declared,
        is_leaf=lambda x: isinstance(x, Declared),
    )
    params["layers"]["0"]["up"]["kernel"] = quantize_int8(params["layers"]["0"]["up"]["kernel"], (-2,))
    tokens = jnp.asarray(random.integers(4, 48, (8, 9)), jnp.int32)
    mask = jnp.ones((8, 9), bool)

    @jax.jit
    def hidden(params: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return forward(CONFIG, SPEC, params, tokens, mask, Execution.choose()).hidden

    mesh = make_mesh(model=model)
    rows = jax.NamedSharding(mesh, P("data"))
    split = hidden(place(params, shardings(declared, mesh)), jax.device_put(tokens, rows), jax.device_put(mask, rows))
    assert len(split.sharding.device_set) == 8
    np.testing.assert_allclose(split, hidden(params, tokens, mask), atol=1e-5)
