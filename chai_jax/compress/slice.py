"""Selecting heads of a layer: representatives are kept, the weights of the other heads are removed."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from chai_jax.model.params import Params
from chai_jax.model.quantized import Int4Array, Leaf, QuantizedArray
from chai_jax.plans.spec import LayerSpec


def of_heads(heads: Sequence[int], each: int) -> list[int]:
    """Where the queries (or outputs) of these heads are, of which each head has so many."""
    return [head * each + at for head in heads for at in range(each)]


def representative_scores(params: Params, kept: Sequence[int], each: int = 1) -> Params:
    """Query and key projections of the heads stored at `kept` alone, each with its queries."""
    return {"query": take_heads(params["query"], of_heads(kept, each)), "key": take_heads(params["key"], kept)}


def merged_queries(params: Params, clusters: Sequence[Sequence[Sequence[int]]]) -> Params:
    """Queries of each head merged: of each cluster its first query stays, and output projections are summed.

    Queries of a head read one key and one value. Where they share the attention A of their first, what they add to the
    layer's output is A V W_1 + A V W_2 = A V (W_1 + W_2), so that one query and one output projection do the same.

    Args:
        clusters: of each head, in the order stored, the clusters of its queries, by their numbers in the head.
    """
    each = sum(map(len, clusters[0]))
    kept = [head * each + one[0] for head, own in enumerate(clusters) for one in own]
    members = [[head * each + query for query in one] for head, own in enumerate(clusters) for one in own]
    output, kernel = params["output"], np.asarray(params["output"]["kernel"], np.float32)
    summed = np.stack([kernel[one].sum(axis=0) for one in members])
    return {
        **params,
        "query": take_heads(params["query"], kept),
        "output": {**output, "kernel": jnp.asarray(summed, output["kernel"].dtype)},
    }


def every_value(params: Params, members: Sequence[Sequence[int]], each: int = 1) -> Params:
    """Value and output projections of all heads, in the order of their clusters (`qk`)."""
    everyone = [head for heads in members for head in heads]
    output = params["output"]
    return {
        "value": take_heads(params["value"], everyone),
        "output": {**output, "kernel": take(output["kernel"], of_heads(everyone, each), axis=-3)},
    }


def representative_values(
    params: Params, kept: Sequence[int], members: Sequence[Sequence[int]], each: int = 1
) -> Params:
    """One value head per cluster, output projections summed, of a head's queries one by one (`qkv`).

    The value biases of merged heads move into the output bias. That is exact, since softmax rows sum to one. Without an
    output bias the representative's stays.
    """
    value, output = params["value"], params["output"]
    kernel = np.asarray(output["kernel"], np.float32)
    by_head = kernel.reshape(-1, each, *kernel.shape[1:])
    folded = np.concatenate([by_head[list(heads)].sum(axis=0) for heads in members])
    new_output = {**output, "kernel": jnp.asarray(folded, output["kernel"].dtype)}
    new_value = take_heads(value, kept)
    if "bias" in value and "bias" in output:
        moved = [head for heads in members if len(heads) > 1 for head in heads]
        summed = kernel if each == 1 else by_head.sum(axis=1)
        constant = np.einsum("hr,hrd->d", np.asarray(value["bias"], np.float32)[moved], summed[moved])
        new_output["bias"] = jnp.asarray(np.asarray(output["bias"], np.float32) + constant, output["bias"].dtype)
        bias = np.array(new_value["bias"])
        bias[[at for at, heads in enumerate(members) if len(heads) > 1]] = 0
        new_value["bias"] = jnp.asarray(bias)
    return {"value": new_value, "output": new_output}


def reorder(layer: LayerSpec, params: Params, order: list[int]) -> Params:
    """Permute a layer's clusters: each takes its query, key, value and output heads along."""
    if order == list(range(len(order))):
        return params

    def heads(width: dict[int, int]) -> list[int]:
        starts = [sum(width[before] for before in range(at)) for at in range(len(order))]
        return [starts[at] + step for at in order for step in range(width[at])]

    shapes = [(group.queries, group.values) for group in layer.groups for _ in range(group.clusters)]
    queries = {at: q for at, (q, _) in enumerate(shapes)}
    values = {at: v for at, (_, v) in enumerate(shapes)}
    outputs = {at: q * v for at, (q, v) in enumerate(shapes)}
    return {
        **params,
        "query": take_heads(params["query"], heads(queries)),
        "key": take_heads(params["key"], order),
        "value": take_heads(params["value"], heads(values)),
        "output": {**params["output"], "kernel": take(params["output"]["kernel"], heads(outputs), axis=-3)},
    }


def take(leaf: Leaf, indices: Sequence[int], axis: int) -> Leaf:
    """Select along a (negative) axis of a leaf, and of its scale where the scale has that axis.

    It must not be the axis of an int4 array's groups. This is done on the host: every shape is new, and to compile a
    program for each would take longer than to copy.
    """

    def select(x: Array, axis: int) -> Array:
        return jnp.asarray(np.take(np.asarray(x), indices, axis=axis))

    if isinstance(leaf, Int4Array):
        return jax.tree.map(lambda x: select(x, axis), leaf)
    if not isinstance(leaf, QuantizedArray):
        return select(leaf, axis)
    scale = leaf.scale
    if axis not in leaf.axes:
        scale = select(scale, axis + sum(reduced > axis for reduced in leaf.axes))
    return dataclasses.replace(leaf, values=select(leaf.values, axis), scale=scale)


def take_heads(projection: Params, heads: Sequence[int]) -> Params:
    """Select heads of a query, key or value projection: kernel [D, heads, R], bias [heads, R]."""
    return {name: take(leaf, heads, axis=-2) for name, leaf in projection.items()}
