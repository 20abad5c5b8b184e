"""Storage formats as surgery: the cache formats and weight formats that a plan asks for, layer by layer."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from chai_jax.compress.basis_stream import BasisStream
from chai_jax.compress.slice import reorder
from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.model.layerwise import Text
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import Int4Array, Leaf, Quantized, dequantize, is_leaf, quantize_int4, quantize_int8
from chai_jax.plans.formats import BASIS, STORAGES, UNFITTED
from chai_jax.plans.plan import LayerPlan, Plan
from chai_jax.plans.planned import cluster_order
from chai_jax.plans.spec import LayerSpec, Spec

# The contracted axes of each kernel of a layer: int8 weights have one scale per output channel, int4 weights one for
# each GROUP entries along the last of these axes.
CONTRACTED = {
    "query": (-3,),
    "key": (-3,),
    "value": (-3,),
    "output": (-3, -2),
    "gate": (-2,),
    "up": (-2,),
    "down": (-2,),
}
GROUP = 64

_quantize = jax.jit(quantize_int8, static_argnums=(1, 2))  # one program a shape instead of one per operation


def quantize(model: Model, plan: Plan, text: Text | None = None) -> Model:
    """Apply the plan's storage formats to cache and weights (CHAI-Quant).

    The model may be clustered by this plan or still dense; a merged head gets the format of the plan's cluster.

    Args:
        text: calibration windows (a probe will do), to which bases of keys are fitted; other formats need none.

    Raises:
        InputError: the plan is for another shape of model, would store one cached head in two formats, or keeps keys in
            a basis and there is no text.
    """
    plan.check()
    plan.check_model(model.config)
    if plan.has_basis and text is None:
        raise InputError("the plan stores keys in a basis; expected calibration text to fit it to: give the probe")
    layers = dict(model.params["layers"])
    spec = model.spec
    stream = BasisStream(model, text) if plan.has_basis and text is not None else None
    for index, wanted in enumerate(track(plan.layers, "Fitting bases") if stream else plan.layers):
        new, params = _store_layer(index, spec.layers[index], layers[str(index)], wanted)
        if wanted.channels and stream is not None:
            params["basis"] = stream.params(wanted.channels)
        if stream is not None:
            stream.advance()
        layers[str(index)] = store_weights(params, wanted.weights)
        spec = spec.with_layer(index, dataclasses.replace(new, weights=wanted.weights))
    return model.replace(spec=spec, params={**model.params, "layers": layers}, plan=plan)


def _store_layer(index: int, layer: LayerSpec, params: Params, wanted: LayerPlan) -> tuple[LayerSpec, Params]:
    """Give each cluster its cache format, and reorder clusters and their heads so that groups are contiguous."""
    format_of = {head: cluster.storage for cluster in wanted.clusters for head in cluster.heads}
    if layer.membership == "prompt":
        # Any head may be kept, so all must have one format; no order matters.
        return layer.stored_as([_one_format(index, range(len(format_of)), format_of)] * layer.key_heads), params
    storages = [_one_format(index, heads, format_of) for heads in layer.clusters]
    order = cluster_order(layer.share, layer.clusters, storages)
    clusters, pairs = (tuple(all[at] for at in order) if all else () for all in (layer.clusters, layer.pairs))
    ordered = dataclasses.replace(layer, clusters=clusters, pairs=pairs)
    kept = {name: leaf for name, leaf in params.items() if name != "basis"}
    return ordered.stored_as([storages[at] for at in order], wanted.channels), reorder(layer, kept, order)


def _one_format(index: int, heads: Iterable[int], format_of: Mapping[int, str]) -> str:
    """The format of heads that share a cached one."""
    formats = sorted({format_of[head] for head in heads})
    if len(formats) > 1:
        raise InputError(
            f"layer {index}: heads {list(heads)} share a cached head, the plan stores it as {' and '.join(formats)}"
            "; expected the plan the model was clustered by"
        )
    return formats[0]


def store_weights(params: Params, weights: str) -> Params:
    """A layer's parameters, kernels in the format `weights`: as loaded, bfloat16, int8 per output channel, or
    int4 by groups."""
    if weights == "loaded":
        return params
    stored = dict(params)
    for name, axes in CONTRACTED.items():
        if name in params:  # not every family has a gate
            stored[name] = {**params[name], "kernel": _store_kernel(params[name]["kernel"], axes, weights)}
    return stored


def _store_kernel(kernel: Leaf, axes: tuple[int, ...], weights: str) -> Leaf:
    if isinstance(kernel, Int4Array):
        return kernel  # as small as it gets; a second rounding would only cost accuracy
    if weights == "int4":
        return quantize_int4(dequantize(kernel), axes[-1], GROUP)
    if isinstance(kernel, Quantized):
        return kernel
    if weights == "int8":
        return _quantize(kernel, axes, jnp.dtype(jnp.float32))
    # A float16 kernel is as small as a bfloat16 one and finer.
    return kernel if kernel.dtype.itemsize <= 2 else kernel.astype(jnp.bfloat16)


def with_storage(model: Model, storage: str) -> Model:
    """The same model with its whole cache stored in one format.

    Raises:
        InputError: `storage` is none of `STORAGES`, or one that needs calibration text.
    """
    if storage not in STORAGES:
        raise InputError(f"storage {storage!r} is unknown; expected one of {', '.join(STORAGES)}")
    if storage in BASIS:
        raise InputError(
            f"storage {storage!r} keeps keys in a basis that is fitted to text: make a plan with chai-jax plan "
            f"--storages {storage} --kv-budget 0.2, or use {', '.join(UNFITTED)}"
        )
    layers = {
        index: {name: leaf for name, leaf in layer.items() if name != "basis"}
        for index, layer in model.params["layers"].items()
    }
    spec = Spec(tuple(layer_with_storage(layer, storage) for layer in model.spec.layers))
    return model.replace(spec=spec, params={**model.params, "layers": layers})


def layer_with_storage(layer: LayerSpec, storage: str) -> LayerSpec:
    """The same layer with its whole cache stored in one format."""
    return layer.stored_as([storage] * layer.key_heads)


def dequantize_weights(params: Any) -> Any:
    """A parameter tree without quantized leaves: their kernels become float32, all else stays as it is."""

    def plain(leaf: Leaf) -> Leaf:
        return dequantize(leaf) if isinstance(leaf, Quantized) else leaf

    return jax.tree.map(plain, params, is_leaf=is_leaf)
