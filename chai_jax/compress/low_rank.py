"""From closed forms to parameters: the heads of a layer in float64, and merged ones in the layout of the tree."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from chai_jax.compress.merge import HeadWeights, Scores, Values
from chai_jax.model.params import Params
from chai_jax.model.quantized import dequantize


def dense_heads(params: Params) -> HeadWeights:
    """All heads of a dense layer, as they are stored."""

    def wide(name: str, part: str) -> np.ndarray:
        return np.asarray(dequantize(params[name][part]), np.float64)

    query, key, value, output = (wide(name, "kernel") for name in ("query", "key", "value", "output"))
    return HeadWeights(query, wide("query", "bias"), key, value, wide("value", "bias"), output)


def as_they_are(heads: HeadWeights) -> tuple[Scores, Values]:
    """A single head, unmerged, in the shape that merged ones have."""
    return (
        Scores(heads.query, heads.query_bias, heads.key[:, 0], np.zeros(heads.key.shape[-1])),
        Values(heads.value[:, 0], heads.value_bias[0], heads.output, np.zeros(heads.output.shape[-1])),
    )


def score_params(params: Params, clusters: Sequence[Scores]) -> Params:
    """Query and key projections of these clusters, in the dtypes of `params`."""
    query, key = params["query"], params["key"]
    return {
        "query": {
            "kernel": _like(query["kernel"], np.concatenate([one.query for one in clusters], axis=1)),
            "bias": _like(query["bias"], np.concatenate([one.query_bias for one in clusters])),
        },
        "key": {
            "kernel": _like(key["kernel"], np.stack([one.key for one in clusters], axis=1)),
            "bias": _like(key["bias"], np.stack([one.key_bias for one in clusters])),
        },
    }


def value_params(params: Params, clusters: Sequence[Values]) -> Params:
    """Value and output projections of these clusters, in the dtypes of `params`."""
    value, output = params["value"], params["output"]
    constant = np.asarray(output["bias"], np.float64) + sum(one.constant for one in clusters)
    return {
        "value": {
            "kernel": _like(value["kernel"], np.stack([one.value for one in clusters], axis=1)),
            "bias": _like(value["bias"], np.stack([one.value_bias for one in clusters])),
        },
        "output": {
            "kernel": _like(output["kernel"], np.concatenate([one.output for one in clusters])),
            "bias": _like(output["bias"], constant),
        },
    }


def _like(old: Array, new: np.ndarray) -> Array:
    return jnp.asarray(new, old.dtype)
