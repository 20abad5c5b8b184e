"""The layout of what is no ordinary model: clustered heads, quantized weights, quantized caches.

config.json says "model_type": "chai_opt" (of an OPT), and tensors have the names of our parameter tree. An int8 array
is two tensors: NAME (int8) and NAME.scale. An int4 array is three: NAME (uint8, two numbers a byte), NAME.scale and
NAME.low. spec.json says what each layer is, and how each array is quantized: along which axes (int8), or along which
axis and in groups of how many (int4).
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.files.atomic import write_json
from chai_jax.files.convert import flatten, read_finite
from chai_jax.files.families.registry import COMPRESSED, family_of
from chai_jax.files.stored import Stored
from chai_jax.files.weights import write_weights
from chai_jax.inputs.reading import read_json
from chai_jax.model.model import Model
from chai_jax.model.params import Declared, Params, declare
from chai_jax.model.quantized import Int4Array, QuantizedArray
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec

# transformers stops at a quantization that names no method, even where it is made to look past the model_type.
FORMAT = {"format": "chai_jax"}
# Per weight of a kernel; "loaded" is the most that may be.
WEIGHT_BYTES = {"loaded": 4, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int4": 0.5}


def write_compressed(folder: Path, model: Model) -> None:
    """Write config.json and the weights; `write_spec` must go with it."""
    family = family_of(model.config)
    kind = {"model_type": COMPRESSED + family.model_type, "quantization_config": FORMAT}
    write_json(folder / "config.json", {**kind, **family.config_fields(model.config)})
    write_weights(folder, _to_stored(model.params), FORMAT)


def write_spec(folder: Path, model: Model) -> None:
    """Write spec.json."""
    quantized: dict[str, Any] = {}
    for path, leaf in flatten(model.params)[0]:
        if isinstance(leaf, Int4Array):
            quantized[".".join(path)] = {"axis": leaf.axis, "group": leaf.group}
        elif isinstance(leaf, QuantizedArray):
            quantized[".".join(path)] = leaf.axes
    write_json(folder / "spec.json", {**model.spec.to_json(), "quantized": quantized})


def _to_stored(params: Params) -> dict[str, Stored]:
    tensors = {}
    for path, leaf in flatten(params)[0]:
        name = ".".join(path)
        if isinstance(leaf, Int4Array):
            tensors[name] = _stored(leaf.packed)
            tensors[f"{name}.scale"], tensors[f"{name}.low"] = _stored(leaf.scale), _stored(leaf.low)
        elif isinstance(leaf, QuantizedArray):
            tensors[name], tensors[f"{name}.scale"] = _stored(leaf.values), _stored(leaf.scale)
        else:
            tensors[name] = _stored(leaf)
    return tensors


def _stored(array: jax.Array) -> Stored:
    return Stored(array.shape, str(array.dtype), "", lambda: np.asarray(array))


def read_spec(path: Path, config: Architecture) -> tuple[Spec, dict[str, Any]]:
    """The spec in a spec.json, and how arrays are quantized (axes, or axis and group) by name.

    Raises:
        InputError: it is no spec, or one of a model of another shape.
    """
    value = read_json(path)
    spec = Spec.from_json(value)
    if len(spec.layers) != config.num_layers:
        raise InputError(f"{path} has {len(spec.layers)} layers, config.json {config.num_layers}: save the model again")
    for index, layer in enumerate(spec.layers):
        dense = (
            all(len(heads) == 1 for heads in layer.clusters) and layer.key_rank == layer.value_rank == config.head_dim
        )
        if sorted(head for heads in layer.clusters for head in heads) != list(range(config.kv_heads)):
            raise InputError(
                f"{path} layer {index} does not have each of the {config.kv_heads} heads once: save the model again"
            )
        own, theirs = (layer.queries, layer.window), (config.queries, config.windows[index] if config.windows else 0)
        may_have_fewer = layer.share != "dense" and layer.membership == "calibrated"
        if own[1] != theirs[1] or own[0] > theirs[0] or (own[0] < theirs[0] and not may_have_fewer):
            raise InputError(
                f"{path} layer {index} has (queries, window) {own}, config.json {theirs}: save the model again"
            )
        _check_pairs(path, index, layer, config)
        if layer.share == "dense" and not dense:
            raise InputError(f"{path} layer {index} is called dense and is not: save the model again")
        if max(layer.key_rank, layer.value_rank) > config.hidden_size:
            raise InputError(f"{path} layer {index} has a rank above {config.hidden_size}, the width: save it again")
    quantized = value.get("quantized", {})
    if not isinstance(quantized, dict):
        raise InputError(f"{path} has quantized {quantized!r:.80}; expected names with axes: save the model again")
    return spec, quantized


def _check_pairs(path: Path, index: int, layer: LayerSpec, config: Architecture) -> None:
    """Rotary keys have frequencies that there are; other keys have none, nor have ordinary heads."""
    most = config.head_dim // 2 if config.rotary else 0
    known = all(pair < most for pairs in layer.pairs for pair in pairs)
    if not known or (most and not layer.pairs and layer.key_rank != config.head_dim):
        raise InputError(f"{path} layer {index} has pairs that are no frequencies of its keys: save the model again")


def read_params(config: Architecture, spec: Spec, tensors: dict[str, Stored], quantized: dict[str, Any]) -> Params:
    """Read our own weights, each checked against what configuration and spec demand; `tensors` is emptied on the way.

    Raises:
        InputError: naming the tensor that is missing, unknown, misshapen, of the wrong dtype, or not finite.
    """
    declared, structure = flatten(declare(config, spec))
    leaves = []
    for path, what in track(declared, "reading weights"):
        name = ".".join(path)
        if name in quantized:
            read = _read_int4 if isinstance(quantized[name], dict) else _read_int8
            leaf: Any = read(name, what, tensors, quantized[name])
        else:
            leaf = jnp.array(read_finite(name, _take(name, what.shape, tensors)))
        leaves.append(leaf)
    unknown = sorted(tensors.keys() | quantized.keys() - {".".join(path) for path, _ in declared})
    if unknown:
        raise InputError(
            f"spec.json has no place for {unknown[0]!r:.100}, which the folder holds: save the model again"
        )
    return jax.tree.unflatten(structure, leaves)


def _take(name: str, shape: tuple[int, ...], tensors: dict[str, Stored]) -> Stored:
    if name not in tensors:
        raise InputError(f"the weights lack {name} {list(shape)}, which spec.json demands: save the model again")
    stored = tensors.pop(name)
    if stored.shape != shape:
        raise InputError(
            f"{name} in {stored.file} is {list(stored.shape)}; spec.json demands {list(shape)}: save the model again"
        )
    return stored


def _read_int8(name: str, what: Declared, tensors: dict[str, Stored], axes: Any) -> QuantizedArray:
    rank = len(what.shape)
    fits = isinstance(axes, list) and all(type(axis) is int and -rank <= axis < 0 for axis in axes)
    if what.kind != "kernel" or not fits or len(set(axes)) != len(axes):
        raise InputError(
            f"spec.json quantizes {name} along {axes!r:.80}; expected a kernel along its own axes: save the model again"
        )
    values = _take_integers(name, what.shape, "int8", tensors)
    left = tuple(size for axis, size in enumerate(what.shape) if axis - rank not in axes)
    return QuantizedArray(values, _take_scale(name, left, tensors), tuple(axes))


def _read_int4(name: str, what: Declared, tensors: dict[str, Stored], entry: Any) -> Int4Array:
    axis, group = entry.get("axis"), entry.get("group")
    fits = type(axis) is int and type(group) is int and -len(what.shape) <= axis < 0 < group
    if what.kind != "kernel" or not fits or len(entry) != 2:
        raise InputError(
            f"spec.json quantizes {name} by {entry!r:.80}; expected a kernel, one of its own axes, and the size of a "
            "group: save the model again"
        )

    def shape(share: int) -> tuple[int, ...]:
        return tuple(-(-size // share) if at == len(what.shape) + axis else size for at, size in enumerate(what.shape))

    packed = _take_integers(name, shape(2), "uint8", tensors)
    scale = _take_scale(name, shape(group), tensors)
    low = jnp.array(read_finite(f"{name}.low", _take(f"{name}.low", shape(group), tensors)))
    return Int4Array(packed, scale, low, axis, group, bool(what.shape[axis] % 2))


def _take_integers(name: str, shape: tuple[int, ...], dtype: str, tensors: dict[str, Stored]) -> jax.Array:
    stored = _take(name, shape, tensors)
    if stored.dtype != dtype:
        raise InputError(f"{name} in {stored.file} is {stored.dtype}; spec.json demands {dtype}: save the model again")
    return jnp.array(stored.read())


def _take_scale(name: str, shape: tuple[int, ...], tensors: dict[str, Stored]) -> jax.Array:
    stored = _take(f"{name}.scale", shape, tensors)
    scale = read_finite(f"{name}.scale", stored)
    if not (scale > 0).all():
        raise InputError(f"{name}.scale in {stored.file} holds a scale that is not positive: save the model again")
    return jnp.array(scale)


def check_formats(spec: Spec, params: Params) -> None:
    """A kernel may be smaller than its layer's weight format (a second rounding would cost accuracy), never larger."""
    for path, leaf in flatten(params["layers"])[0]:
        name, weights = ".".join(("layers", *path)), spec.layers[int(path[0])].weights
        if isinstance(leaf, Int4Array):
            dtype = "int4"
        else:
            dtype = str(leaf.values.dtype if isinstance(leaf, QuantizedArray) else leaf.dtype)
        if path[-1] == "kernel" and WEIGHT_BYTES[dtype] > WEIGHT_BYTES[weights]:
            raise InputError(
                f"{name} is {dtype}; spec.json says that the weights of its layer are {weights}: save the model again"
            )
