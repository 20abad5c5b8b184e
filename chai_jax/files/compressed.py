"""The layout of what is no ordinary OPT: clustered models, int8 weights, int8 caches.

config.json says "model_type": "chai_opt", and tensors have the names of our parameter tree. A quantized array is two
tensors, NAME (int8) and NAME.scale; spec.json says what each layer is, and along which axes each array is quantized.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.errors import InputError
from chai_jax.files.atomic import write_json
from chai_jax.files.convert import flatten, read_finite
from chai_jax.files.folder import read_json
from chai_jax.files.hf_config import config_fields
from chai_jax.files.stored import Stored
from chai_jax.files.weights import write_weights
from chai_jax.model.model import Model
from chai_jax.model.params import Declared, OPTConfig, Params, declare
from chai_jax.model.quantized import QuantizedArray
from chai_jax.progress import track
from chai_jax.spec import Spec

MODEL_TYPE = "chai_opt"
# transformers stops at a quantization that names no method, even where it is made to look past the model_type.
FORMAT = {"format": "chai_jax"}
WEIGHT_BYTES = {"loaded": 4, "bfloat16": 2, "int8": 1}  # at most, per weight of a kernel


def write(folder: Path, model: Model) -> None:
    """Write config.json and the weights; `write_spec` must go with it."""
    fields = {"model_type": MODEL_TYPE, "quantization_config": FORMAT, **config_fields(model.config)}
    write_json(folder / "config.json", fields)
    write_weights(folder, _to_stored(model.params), FORMAT)


def write_spec(folder: Path, model: Model) -> None:
    """Write spec.json."""
    axes = {".".join(at): leaf.axes for at, leaf in flatten(model.params)[0] if isinstance(leaf, QuantizedArray)}
    write_json(folder / "spec.json", {**model.spec.to_json(), "quantized": axes})


def _to_stored(params: Params) -> dict[str, Stored]:
    tensors = {}
    for path, leaf in flatten(params)[0]:
        name = ".".join(path)
        if isinstance(leaf, QuantizedArray):
            tensors[name], tensors[f"{name}.scale"] = _stored(leaf.values), _stored(leaf.scale)
        else:
            tensors[name] = _stored(leaf)
    return tensors


def _stored(array: jax.Array) -> Stored:
    return Stored(array.shape, str(array.dtype), "", lambda: np.asarray(array))


def read_spec(path: Path, config: OPTConfig) -> tuple[Spec, dict[str, Any]]:
    """The spec in a spec.json, and the axes of the quantized arrays by name.

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
        if sorted(head for heads in layer.clusters for head in heads) != list(range(config.num_heads)):
            raise InputError(
                f"{path} layer {index} does not have each of the {config.num_heads} heads once: save the model again"
            )
        if layer.share == "dense" and not dense:
            raise InputError(f"{path} layer {index} is called dense and is not: save the model again")
    axes = value.get("quantized", {})
    if not isinstance(axes, dict):
        raise InputError(f"{path} has quantized {axes!r:.80}; expected names with axes: save the model again")
    return spec, axes


def read_params(config: OPTConfig, spec: Spec, tensors: dict[str, Stored], axes: dict[str, Any]) -> Params:
    """Read our own weights, each checked against what configuration and spec demand; `tensors` is emptied on the way.

    Raises:
        InputError: naming the tensor that is missing, unknown, misshapen, of the wrong dtype, or not finite.
    """
    declared, structure = flatten(declare(config, spec))
    leaves = []
    for path, what in track(declared, "reading weights"):
        name = ".".join(path)
        if name in axes:
            leaf: Any = _read_quantized(name, what, tensors, axes[name])
        else:
            leaf = jnp.array(read_finite(name, _take(name, what.shape, tensors)))
        leaves.append(leaf)
    unknown = sorted(tensors.keys() | axes.keys() - {".".join(path) for path, _ in declared})
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


def _read_quantized(name: str, what: Declared, tensors: dict[str, Stored], axes: Any) -> QuantizedArray:
    rank = len(what.shape)
    fits = isinstance(axes, list) and all(type(axis) is int and -rank <= axis < 0 for axis in axes)
    if what.kind != "kernel" or not fits or len(set(axes)) != len(axes):
        raise InputError(
            f"spec.json quantizes {name} along {axes!r:.80}; expected a kernel along its own axes: save the model again"
        )
    values = _take(name, what.shape, tensors)
    if values.dtype != "int8":
        raise InputError(f"{name} in {values.file} is {values.dtype}; spec.json demands int8: save the model again")
    left = tuple(size for axis, size in enumerate(what.shape) if axis - rank not in axes)
    scale = read_finite(f"{name}.scale", _take(f"{name}.scale", left, tensors))
    if not (scale > 0).all():
        raise InputError(f"{name}.scale in {values.file} holds a scale that is not positive: save the model again")
    return QuantizedArray(jnp.array(values.read()), jnp.array(scale), tuple(axes))


def check_formats(spec: Spec, params: Params) -> None:
    """A kernel may be smaller than its layer's weight format (a second rounding would cost accuracy), never larger."""
    for path, leaf in flatten(params["layers"])[0]:
        name, weights = ".".join(("layers", *path)), spec.layers[int(path[0])].weights
        dtype = leaf.values.dtype if isinstance(leaf, QuantizedArray) else leaf.dtype
        if path[-1] == "kernel" and dtype.itemsize > WEIGHT_BYTES[weights]:
            raise InputError(
                f"{name} is {dtype}; spec.json says that the weights of its layer are {weights}: save the model again"
            )
