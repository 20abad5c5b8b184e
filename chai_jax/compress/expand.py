"""Back to an ordinary model: a clustered one with all its heads written out, for other tools and for tests."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from chai_jax.compress.quantize import dequantize_weights
from chai_jax.compress.slice import of_heads, take_heads
from chai_jax.errors import InputError
from chai_jax.files.families.registry import family_of
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec, group_clusters


def expand(model: Model) -> Model:
    """A dense model with equal logits (float32 rounding aside): shared heads are repeated, ranks padded with zeros.

    Where queries of a head were merged, the first stands in for those that are gone, and these add nothing.
    Each head keeps its cluster's cache format. Quantized weights become float32. The heads come in the order in which
    they are stored, which changes no logit.

    Raises:
        InputError: a layer finds its clusters per prompt; its shared keys or values have a larger rank than a dense
            head has dimensions, or several numbers of one rotary frequency.
    """
    params, name = dequantize_weights(model.params), family_of(model.config).name
    layers = {}
    spec_layers = []
    for index, layer in enumerate(model.spec.layers):
        if layer.membership == "prompt":
            raise InputError(
                f"layer {index} finds its clusters anew for every prompt, an ordinary {name} has none; such a model "
                f"has no ordinary {name} form: save it instead of exporting it"
            )
        rank = max(layer.key_rank, layer.value_rank)
        if rank > model.config.head_dim:
            raise InputError(
                f"layer {index} shares keys or values of rank {rank}, a dense head has {model.config.head_dim} "
                f"dimensions; such a model has no ordinary {name} form: save it instead of exporting it"
            )
        if any(len(set(pairs)) < len(pairs) for pairs in layer.pairs):
            raise InputError(
                f"layer {index} has keys with several numbers of one frequency, a dense head has one of each; such a "
                f"model has no ordinary {name} form: save it instead of exporting it"
            )
        new, layers[str(index)] = _expand_layer(layer, params["layers"][str(index)], model.config)
        spec_layers.append(new)
    return model.replace(spec=Spec(tuple(spec_layers)), params={**params, "layers": layers}, plan=None)


def ordinary(model: Model) -> Model:
    """The model as an ordinary one of its family: as it is, with fewer key and value heads, or else expanded.

    Raises:
        InputError: see `expand`.
    """
    return model if model.spec.is_dense else grouped(model) or expand(model)


def grouped(model: Model) -> Model | None:
    """A clustered model as a dense one with fewer heads, equal in logits, bytes and speed; None if it is none.

    It is one where all layers have the same number of keys, each with one value and the same number of queries, all of
    an ordinary head's dimensions, and where the family can say so in its config.json.
    """
    first, config, family = model.spec.layers[0].groups[0], model.config, family_of(model.config)
    count = model.spec.layers[0].key_heads
    if any(layer.key_heads != count for layer in model.spec.layers):
        return None
    for layer in model.spec.layers:
        alike = all((group.queries, group.values) == (first.queries, 1) for group in layer.groups)
        whole = layer.key_rank == layer.value_rank == config.head_dim and not layer.pairs
        if not (alike and whole and layer.membership == "calibrated"):
            return None
    smaller = dataclasses.replace(
        config, num_heads=count * first.queries, num_kv_heads=count, head_size=config.head_dim
    )
    if family.parse_config(family.config_fields(smaller), "config.json") != smaller:
        return None
    spec = Spec.of(smaller)
    pairs = zip(spec.layers, model.spec.layers, strict=True)
    layers = tuple(layer.stored_as(old.storages, old.channels) for layer, old in pairs)
    return model.replace(config=smaller, spec=Spec(layers), params=dequantize_weights(model.params), plan=None)


def _expand_layer(layer: LayerSpec, params: Params, config: Architecture) -> tuple[LayerSpec, Params]:
    if layer.share == "dense":
        return dataclasses.replace(layer, weights="loaded"), params
    head_dim, each = config.head_dim, config.queries

    def all_queries(heads: Sequence[int]) -> list[int]:
        """Where the queries (or outputs) of these heads are: the first again for each that was merged away."""
        own = [of_heads([head], layer.queries) for head in heads]
        return [at for one in own for at in one + one[:1] * (each - layer.queries)]

    # For each dense head: the key and value head it reads, or None where nothing is left for it to do; for each query
    # of it, the query head and the output head.
    queries: list[int] = []
    keys: list[int] = []
    values: list[int | None] = []
    for cluster, heads in enumerate(layer.clusters):
        for slot in range(len(heads)):
            queries += all_queries([len(keys) if layer.share == "kv" else cluster])
            keys.append(cluster)
            if layer.share == "qk":
                values.append(len(values))
            else:
                values.append(cluster if slot == 0 or layer.share == "kv" else None)
    kept = jnp.asarray([value is not None for value in values])
    chosen = [0 if value is None else value for value in values]
    outputs = queries if layer.share == "kv" else all_queries(chosen)
    query, key = take_heads(params["query"], queries), take_heads(params["key"], keys)
    value = {
        name: jnp.where(kept[:, None], leaf, jnp.zeros_like(leaf))
        for name, leaf in take_heads(params["value"], chosen).items()
    }
    output = jnp.take(params["output"]["kernel"], jnp.asarray(outputs), axis=0)
    adds = (kept[:, None] & (jnp.arange(each) < layer.queries)).reshape(-1)
    output = jnp.where(adds[:, None, None], output, jnp.zeros_like(output))
    storages = [storage for heads, storage in zip(layer.clusters, layer.storages, strict=True) for _ in heads]
    clusters = tuple((head,) for heads in layer.clusters for head in heads)
    groups = group_clusters("dense", clusters, storages, per_head=each)
    spec = LayerSpec("dense", clusters, groups, head_dim, head_dim, queries=each, window=layer.window)
    pairs = [layer.pairs[cluster] for cluster in keys] if layer.pairs else []
    of_each_query = [one for one in pairs for _ in range(each)]
    return spec, {
        **params,
        "query": {name: _whole(leaf, of_each_query, head_dim) for name, leaf in query.items()},
        "key": {name: _whole(leaf, pairs, head_dim) for name, leaf in key.items()},
        "value": {name: _pad(leaf, -1, head_dim) for name, leaf in value.items()},
        "output": {**params["output"], "kernel": _pad(output, -2, head_dim)},
    }


def _whole(leaf: Array, pairs: Sequence[tuple[int, ...]], head_dim: int) -> Array:
    """Queries or keys [..., heads, R] in a dense head's dimensions: rotary numbers stand at their frequencies."""
    if not pairs:
        return _pad(leaf, -1, head_dim)
    at = np.asarray(pairs)
    at = np.concatenate([at, at + head_dim // 2], axis=-1)
    out = jnp.zeros((*leaf.shape[:-1], head_dim), leaf.dtype)
    return out.at[..., np.arange(len(at))[:, None], at].set(leaf)


def _pad(leaf: Array, axis: int, size: int) -> Array:
    room = [(0, size - leaf.shape[at] if at == axis % leaf.ndim else 0) for at in range(leaf.ndim)]
    return jnp.pad(leaf, room)
