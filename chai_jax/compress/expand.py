"""Back to an ordinary model: a clustered one with all its heads written out, for other tools and for tests."""

import jax.numpy as jnp
from jaxtyping import Array

from chai_jax.compress.quantize import dequantize_weights
from chai_jax.compress.slice import take_heads
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.spec import LayerSpec, Spec, group_clusters


def expand(model: Model) -> Model:
    """A dense model with equal logits (float32 rounding aside): shared heads are repeated, ranks padded with zeros.

    Each head keeps its cluster's cache format. Quantized weights become float32. The heads come in the order in which
    they are stored, which changes no logit.

    Raises:
        InputError: a layer finds its clusters per prompt, or its shared keys or values have a larger rank than a dense
            head has dimensions.
    """
    params = dequantize_weights(model.params)
    layers = {}
    spec_layers = []
    for index, layer in enumerate(model.spec.layers):
        if layer.membership == "prompt":
            raise InputError(
                f"layer {index} finds its clusters anew for every prompt, an ordinary OPT has none; such a model has "
                "no ordinary OPT form: save it instead of exporting it"
            )
        rank = max(layer.key_rank, layer.value_rank)
        if rank > model.config.head_dim:
            raise InputError(
                f"layer {index} shares keys or values of rank {rank}, a dense head has {model.config.head_dim} "
                "dimensions; such a model has no ordinary OPT form: save it instead of exporting it"
            )
        new, layers[str(index)] = _expand_layer(layer, params["layers"][str(index)], model.config.head_dim)
        spec_layers.append(new)
    return model.replace(spec=Spec(tuple(spec_layers)), params={**params, "layers": layers}, plan=None)


def _expand_layer(layer: LayerSpec, params: Params, head_dim: int) -> tuple[LayerSpec, Params]:
    if layer.share == "dense":
        return LayerSpec("dense", layer.clusters, layer.groups, head_dim, head_dim), params
    # For each dense head: the query, key and value head it reads, or None where nothing is left for it to do.
    queries: list[int] = []
    keys: list[int] = []
    values: list[int | None] = []
    for cluster, heads in enumerate(layer.clusters):
        for slot in range(len(heads)):
            queries.append(len(queries) if layer.share == "kv" else cluster)
            keys.append(cluster)
            if layer.share == "qk":
                values.append(len(values))
            else:
                values.append(cluster if slot == 0 or layer.share == "kv" else None)
    kept = jnp.asarray([value is not None for value in values])
    chosen = [0 if value is None else value for value in values]
    outputs = queries if layer.share == "kv" else chosen
    query, key = take_heads(params["query"], queries), take_heads(params["key"], keys)
    value = {
        name: jnp.where(kept[:, None], leaf, jnp.zeros_like(leaf))
        for name, leaf in take_heads(params["value"], chosen).items()
    }
    output = jnp.take(params["output"]["kernel"], jnp.asarray(outputs), axis=0)
    output = jnp.where(kept[:, None, None], output, jnp.zeros_like(output))
    storages = [storage for heads, storage in zip(layer.clusters, layer.storages, strict=True) for _ in heads]
    clusters = tuple((head,) for heads in layer.clusters for head in heads)
    spec = LayerSpec("dense", clusters, group_clusters("dense", clusters, storages), head_dim, head_dim)
    return spec, {
        **params,
        "query": {name: _pad(leaf, -1, head_dim) for name, leaf in query.items()},
        "key": {name: _pad(leaf, -1, head_dim) for name, leaf in key.items()},
        "value": {name: _pad(leaf, -1, head_dim) for name, leaf in value.items()},
        "output": {**params["output"], "kernel": _pad(output, -2, head_dim)},
    }


def _pad(leaf: Array, axis: int, size: int) -> Array:
    room = [(0, size - leaf.shape[at] if at == axis % leaf.ndim else 0) for at in range(leaf.ndim)]
    return jnp.pad(leaf, room)
