"""Where arrays lie on a mesh: one table from logical axes to the mesh axes `data` and `model`.

`declare` names the axes of every parameter, the table says which of them are split. Data parallelism splits the batch;
a `model` axis above 1 also splits heads, feed-forward and vocabulary (Megatron's cut, Shoeybi et al. 2019, arXiv
1909.08053). XLA inserts the communication.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from chai_jax.errors import InputError
from chai_jax.model.params import Declared, Params
from chai_jax.model.quantized import Int4Array, Leaf, QuantizedArray, is_leaf

Table = Mapping[str, str | None]

TABLE: Table = {
    "batch": "data",
    "heads": "model",
    "ffn": "model",
    "vocab": "model",
    "width": None,
    "rank": None,
    "embed": None,
    "position": None,
}


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """A mesh of `data` x `model` devices; `data` is as large as the devices allow if not given.

    Raises:
        InputError: there are not that many devices, or `model` does not divide them.
    """
    devices = jax.devices()
    if data is None:
        if model < 1 or len(devices) % model:
            raise InputError(f"a model axis of {model} does not divide {len(devices)} devices: choose a divisor")
        data = len(devices) // model
    if not 1 <= data * model <= len(devices) or data < 1:
        raise InputError(f"a mesh of {data} x {model} does not fit {len(devices)} devices: choose a smaller one")
    names = ("data", "model")
    return jax.make_mesh((data, model), names, (AxisType.Auto,) * 2, devices=devices[: data * model])


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, table: Table = TABLE) -> PartitionSpec:
    """How an array with these logical axes is split; an axis that its mesh axis does not divide stays whole.

    Clusters per layer are whatever the elbow found, so most of them will not divide; the rest of the model still does.

    Raises:
        ValueError: the table lacks an axis, or sends two axes of one array to one mesh axis.
    """
    unknown = [axis for axis in axes if axis not in table]
    if unknown:
        raise ValueError(f"the sharding table has no axis {unknown[0]!r}, only {', '.join(table)}")
    wanted = [table[axis] for axis in axes]
    used = [name for name in wanted if name is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"the sharding table sends two of the axes {axes} to one mesh axis: {wanted}")
    return PartitionSpec(
        *(name if name and size % mesh.shape[name] == 0 else None for name, size in zip(wanted, shape, strict=True))
    )


def shardings(declared: Params, mesh: Mesh, table: Table = TABLE) -> Any:
    """A `NamedSharding` for every `Declared` leaf of the tree (see `chai_jax.model.params.declare`)."""

    def leaf(what: Declared) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(what.axes, what.shape, mesh, table))

    return jax.tree.map(leaf, declared, is_leaf=lambda value: isinstance(value, Declared))


def place(params: Any, targets: Any) -> Any:
    """Copy parameters to where `shardings` wants them; a quantized array's scale is split along with its values.

    An int4 array is not split along the axis of its groups where a device would get part of a byte or of a group.
    """

    def leaf(value: Leaf, target: NamedSharding) -> Leaf:
        if isinstance(value, Int4Array):
            return _place_int4(value, target)
        if not isinstance(value, QuantizedArray):
            return jax.device_put(value, target)
        split = list(target.spec) + [None] * (len(value.shape) - len(target.spec))
        reduced = {axis % len(value.shape) for axis in value.axes}
        kept = PartitionSpec(*(name for axis, name in enumerate(split) if axis not in reduced))
        scale = jax.device_put(value.scale, NamedSharding(target.mesh, kept))
        return QuantizedArray(jax.device_put(value.values, target), scale, value.axes)

    return jax.tree.map(leaf, params, targets, is_leaf=is_leaf)


def _place_int4(value: Int4Array, target: NamedSharding) -> Int4Array:
    split = list(target.spec) + [None] * (len(value.shape) - len(target.spec))
    devices = target.mesh.shape[split[value.axis]] if split[value.axis] else 1
    if any(part.shape[value.axis] % devices for part in (value.packed, value.scale)):
        split[value.axis] = None
    return jax.device_put(value, NamedSharding(target.mesh, PartitionSpec(*split)))
