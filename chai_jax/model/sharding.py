"""Where arrays lie on a mesh: one table from logical axes to the mesh axes `data` and `model`.

`declare` names the axes of every parameter, the table says which of them are split. Data parallelism splits the batch;
a `model` axis above 1 also splits heads, feed-forward and vocabulary (Megatron's cut, Shoeybi et al. 2019, arXiv
1909.08053). XLA inserts the communication. Where several query heads read one key head, a device has those of its own
keys. Key heads that `model` does not divide are on every device; XLA then gathers the queries for attention, wherever
they were split.

A `Layout` is a mesh with a table. Every job (training, scoring, probing, generating) takes that of its model's
`Execution`. The mesh may span processes: each of them runs the same program and holds its own devices' parts of every
array. Between jobs a model's parameters are whole on every host.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from chai_jax.errors import InputError
from chai_jax.model.params import Declared, Params, declare
from chai_jax.model.quantized import Int4Array, QuantizedArray, is_leaf
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

Table = Mapping[str, str | tuple[str, ...] | None]

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

# Fully sharded data parallelism (Rajbhandari et al. 2020, arXiv 1910.02054): weights, masters and optimizer state are
# split over `data` too, along the one axis that every large array has, and gathered for an update's forward pass.
FSDP: Table = {**TABLE, "width": "data", "vocab": ("model", "data")}


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


def one_device() -> "Layout":
    """This process's first device alone."""
    devices = jax.local_devices()[:1]
    return Layout(jax.make_mesh((1, 1), ("data", "model"), (AxisType.Auto,) * 2, devices=devices))


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, table: Table = TABLE) -> PartitionSpec:
    """How an array with these logical axes is split; an axis that its mesh axes do not divide stays whole.

    Clusters per layer are whatever the elbow found, so most of them will not divide; the rest of the model still does.
    Of several mesh axes for one logical axis, as many are used as divide it, the first ones first.

    Raises:
        ValueError: the table lacks an axis, or sends two axes of one array to one mesh axis.
    """
    unknown = [axis for axis in axes if axis not in table]
    if unknown:
        raise ValueError(f"the sharding table has no axis {unknown[0]!r}, only {', '.join(table)}")
    wanted = [_names(table[axis]) for axis in axes]
    used = [name for names in wanted for name in names]
    if len(set(used)) < len(used):
        raise ValueError(f"the sharding table sends two of the axes {axes} to one mesh axis: {wanted}")

    def divided(names: tuple[str, ...], size: int) -> str | tuple[str, ...] | None:
        while names and size % prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return names[0] if len(names) == 1 else names or None

    return PartitionSpec(*(divided(names, size) for names, size in zip(wanted, shape, strict=True)))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def shardings(declared: Params, mesh: Mesh, table: Table = TABLE) -> Any:
    """A `NamedSharding` for every `Declared` leaf of the tree (see `chai_jax.model.params.declare`)."""

    def leaf(what: Declared) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(what.axes, what.shape, mesh, table))

    return jax.tree.map(leaf, declared, is_leaf=lambda value: isinstance(value, Declared))


def leaf_sharding(value: Any, target: NamedSharding) -> Any:
    """Where a leaf's arrays lie: a quantized array's scale is split along with its values.

    An int4 array is not split along the axis of its groups where a device would get part of a byte or of a group.
    """
    if not is_leaf(value):
        return target
    split = list(target.spec) + [None] * (len(value.shape) - len(target.spec))
    if isinstance(value, Int4Array):
        names = split[value.axis] or ()
        devices = prod(target.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
        if any(part.shape[value.axis] % devices for part in (value.packed, value.scale)):
            split[value.axis] = None
        place = NamedSharding(target.mesh, PartitionSpec(*split))
        return dataclasses.replace(value, packed=place, scale=place, low=place)
    reduced = {axis % len(value.shape) for axis in value.axes}
    kept = PartitionSpec(*(name for axis, name in enumerate(split) if axis not in reduced))
    return QuantizedArray(target, NamedSharding(target.mesh, kept), value.axes)


def place(params: Any, targets: Any) -> Any:
    """Copy parameters to where `shardings` wants them."""
    return jax.tree.map(
        lambda value, target: jax.tree.map(put, value, leaf_sharding(value, target)), params, targets, is_leaf=is_leaf
    )


def put(x: Any, target: Sharding) -> Any:
    """An array as `target` wants it; where that spans processes, each of them has `x` and copies its own parts."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = whole(x)
    if target.is_fully_addressable:
        return jax.device_put(x, target)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, target, lambda index: host[index])


def whole(tree: Any) -> Any:
    """The tree as numpy arrays on every host; what spans processes is gathered, so all of them must ask."""

    def leaf(x: jax.Array) -> np.ndarray:
        here = x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x) if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(leaf, tree)


@dataclass(frozen=True)
class Layout:
    """A mesh, and whether parameters are split over its `data` axis too (`FSDP`)."""

    mesh: Mesh
    fsdp: bool = False

    @property
    def ways(self) -> int:
        """How many parts a batch is split into."""
        return self.mesh.shape["data"]

    @property
    def platform(self) -> str:
        """What its devices are, which need not be here: "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

    def shardings(self, config: Architecture, spec: Spec) -> Any:
        """Where each of a model's parameters lies."""
        return shardings(declare(config, spec), self.mesh, FSDP if self.fsdp else TABLE)

    def params(self, config: Architecture, spec: Spec, params: Params) -> Params:
        """A model's parameters, placed."""
        return place(params, self.shardings(config, spec))

    def rows(self, tree: Any) -> Any:
        """Arrays with the batch in front, split along it where `ways` divides it; each process has them whole."""
        return jax.tree.map(lambda x: put(x, self._sharding(("batch",), x.shape)), tree)

    def cache(self, layers: Any) -> Any:
        """Inside jit: a cache's arrays [batch, heads, ...], split along both where they divide."""

        def leaf(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x, self._sharding(("batch", "heads"), x.shape))

        return jax.tree.map(leaf, layers)

    def by_device(self, function: Callable[..., jax.Array], x: jax.Array, *more: jax.Array) -> jax.Array:
        """Inside jit: what a function that keeps the shape of `x`, one of a cache's arrays [batch, heads, ...], makes
        of each device's part of it and of what belongs to it, [batch] or [batch, heads, ...]."""
        parts = tuple(self._sharding(("batch", "heads")[: y.ndim], y.shape).spec for y in (x, *more))
        return jax.shard_map(function, mesh=self.mesh, in_specs=parts, out_specs=parts[0])(x, *more)

    def _sharding(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(self.mesh, partition_spec(axes, shape[: len(axes)], self.mesh))

    def share(self, rows: int) -> list[int]:
        """Which of a batch's `rows` (a multiple of `ways`) this process's devices hold."""
        parts = self._sharding(("batch",), (rows,)).addressable_devices_indices_map((rows,)).values()
        return sorted({row for part in parts if part for row in range(*part[0].indices(rows))})

    def join(self, tree: Any, rows: int) -> Any:
        """Batches [microbatches, rows, ...] on the mesh, of which each process brings its `share` of the rows."""
        sharding = NamedSharding(self.mesh, PartitionSpec(None, "data"))

        def leaf(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding, x, (x.shape[0], rows, *x.shape[2:]))

        return jax.tree.map(leaf, tree)
