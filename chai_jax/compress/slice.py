"""Clustering as surgery: representatives are kept, the other heads' weights are really cut away."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import Leaf, QuantizedArray
from chai_jax.spec import STORAGES, LayerPlan, LayerSpec, Plan, group_clusters


def cluster(model: Model, plan: Plan) -> Model:
    """Merge the heads of each of the plan's clusters (CHAI, Agarwal et al. 2024, arXiv 2403.08058).

    Share `qk` keeps one query and key head per cluster and every value head; `qkv` keeps one of each, and the output
    projections of the cluster's heads are summed. Cache formats stay as they are; layers without a merged cluster stay
    untouched, bit for bit.

    Raises:
        InputError: the plan is for another shape of model, or the model's layer is clustered or quantized already.
    """
    plan.check()
    plan.check_model(model.config.num_layers, model.config.num_heads)
    if plan.membership != "calibrated" or plan.share == "kv" or plan.merge != "representative":
        raise InputError(
            f"clustering by share {plan.share!r}, membership {plan.membership!r}, merge {plan.merge!r} is not built; "
            "expected share qk or qkv, membership calibrated, merge representative"
        )
    layers = dict(model.params["layers"])
    spec = model.spec
    for index, wanted in enumerate(plan.layers):
        if wanted.clustered:
            _check_plain(index, spec.layers[index], layers[str(index)])
            new, params = _slice_layer(spec.layers[index], layers[str(index)], wanted, plan.share)
            spec, layers[str(index)] = spec.with_layer(index, new), params
    return model.replace(spec=spec, params={**model.params, "layers": layers}, plan=plan)


def _check_plain(index: int, layer: LayerSpec, params: Params) -> None:
    kernels = [params[name]["kernel"] for name in ("query", "key", "value", "output")]
    if layer.share != "dense" or any(isinstance(kernel, QuantizedArray) for kernel in kernels):
        raise InputError(
            f"layer {index} is clustered or quantized already; expected a dense float layer: start from the dense model"
        )


def _slice_layer(layer: LayerSpec, params: Params, wanted: LayerPlan, share: str) -> tuple[LayerSpec, Params]:
    storage_of = dict(zip((heads[0] for heads in layer.clusters), layer.storages, strict=True))
    stored_at = {heads[0]: at for at, heads in enumerate(layer.clusters)}
    order = cluster_order(share, [c.heads for c in wanted.clusters], [storage_of[c.keep] for c in wanted.clusters])
    clusters = [wanted.clusters[at] for at in order]
    heads = tuple(cluster.heads for cluster in clusters)
    groups = group_clusters(share, heads, [storage_of[cluster.keep] for cluster in clusters])
    new = LayerSpec(share, heads, groups, layer.key_rank, layer.value_rank, layer.weights)

    kept = [stored_at[cluster.keep] for cluster in clusters]
    members = [[stored_at[head] for head in cluster.heads] for cluster in clusters]
    params = {**params, "query": take_heads(params["query"], kept), "key": take_heads(params["key"], kept)}
    if share == "qk":
        everyone = [head for cluster in members for head in cluster]
        params["value"] = take_heads(params["value"], everyone)
        params["output"] = {**params["output"], "kernel": take(params["output"]["kernel"], everyone, axis=-3)}
    else:
        params["value"], params["output"] = _fold_values(params["value"], params["output"], kept, members)
    return new, params


def _fold_values(
    value: Params, output: Params, kept: Sequence[int], members: Sequence[list[int]]
) -> tuple[Params, Params]:
    """One value head per cluster, output projections summed; the value biases of all its heads go, exactly, into the
    output bias, because softmax rows sum to one."""
    kernel = np.asarray(output["kernel"], np.float32)
    folded = np.stack([kernel[heads].sum(axis=0) for heads in members])
    new_output = {**output, "kernel": jnp.asarray(folded, output["kernel"].dtype)}
    new_value = take_heads(value, kept)
    if "bias" in value:
        moved = [head for heads in members if len(heads) > 1 for head in heads]
        constant = np.einsum("hr,hrd->d", np.asarray(value["bias"], np.float32)[moved], kernel[moved])
        new_output["bias"] = jnp.asarray(np.asarray(output["bias"], np.float32) + constant, output["bias"].dtype)
        bias = np.array(new_value["bias"])
        bias[[at for at, heads in enumerate(members) if len(heads) > 1]] = 0
        new_value["bias"] = jnp.asarray(bias)
    return new_value, new_output


def cluster_order(share: str, clusters: Sequence[tuple[int, ...]], storages: Sequence[str]) -> list[int]:
    """The order that makes groups contiguous: by storage, then (where it decides the shape) by cluster size; stable, so
    that singletons of one storage keep the heads' order."""
    sizes = [len(heads) if share in ("qk", "kv") else 1 for heads in clusters]
    return sorted(range(len(clusters)), key=lambda at: (STORAGES.index(storages[at]), sizes[at]))


def take(leaf: Leaf, indices: Sequence[int], axis: int) -> Leaf:
    """Select along a (negative) axis of a leaf, and of its scale where the scale has that axis.

    On the host: every shape is new, and compiling a program for each would take longer than the copies.
    """

    def select(x: Array, axis: int) -> Array:
        return jnp.asarray(np.take(np.asarray(x), indices, axis=axis))

    if not isinstance(leaf, QuantizedArray):
        return select(leaf, axis)
    scale = leaf.scale
    if axis not in leaf.axes:
        scale = select(scale, axis + sum(reduced > axis for reduced in leaf.axes))
    return dataclasses.replace(leaf, values=select(leaf.values, axis), scale=scale)


def take_heads(projection: Params, heads: Sequence[int]) -> Params:
    """Select heads of a query, key or value projection: kernel [D, heads, R], bias [heads, R]."""
    return {name: take(leaf, heads, axis=-2) for name, leaf in projection.items()}
