"""From closed forms to parameters: the heads of a layer in float64, and merged ones in the layout of the tree."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from chai_jax.compress.merge import HeadWeights, Scores, Values
from chai_jax.model.params import Params
from chai_jax.model.quantized import dequantize
from chai_jax.plans.architecture import Architecture


def dense_heads(config: Architecture, params: Params) -> HeadWeights:
    """All heads of a dense layer, as they are stored."""

    def wide(name: str, part: str) -> np.ndarray:
        return np.asarray(dequantize(params[name][part]), np.float64)

    def bias(name: str) -> np.ndarray:
        return wide(name, "bias") if "bias" in params[name] else np.zeros(params[name]["kernel"].shape[-2:])

    query, key, value, output = (wide(name, "kernel") for name in ("query", "key", "value", "output"))
    turning, centred = config.rotary is not None, "bias" in params["output"]
    key_bias = bias("key") if turning else None
    return HeadWeights(query, bias("query"), key, value, bias("value"), output, key_bias, centred)


def as_they_are(heads: HeadWeights) -> tuple[Scores, Values]:
    """A single head, unmerged, in the shape that merged ones have."""
    key_bias = np.zeros(heads.key.shape[-1]) if heads.key_bias is None else heads.key_bias[0]
    return (
        Scores(heads.query, heads.query_bias, heads.key[:, 0], key_bias),
        Values(heads.value[:, 0], heads.value_bias[0], heads.output, np.zeros(heads.output.shape[-1])),
    )


def score_params(params: Params, clusters: Sequence[Scores]) -> Params:
    """Query and key projections of these clusters, in the dtypes of `params`; biases where the family has them."""
    query = np.concatenate([one.query for one in clusters], axis=1)
    query_bias = np.concatenate([one.query_bias for one in clusters])
    key, key_bias = np.stack([one.key for one in clusters], axis=1), np.stack([one.key_bias for one in clusters])
    return {
        "query": _like(params["query"], {"kernel": query, "bias": query_bias}),
        "key": _like(params["key"], {"kernel": key, "bias": key_bias}),
    }


def value_params(params: Params, clusters: Sequence[Values]) -> Params:
    """Value and output projections of these clusters, in the dtypes of `params`; biases where the family has them."""
    value, bias = np.stack([one.value for one in clusters], axis=1), np.stack([one.value_bias for one in clusters])
    output = {"kernel": np.concatenate([one.output for one in clusters])}
    if "bias" in params["output"]:
        constant = sum(one.constant for one in clusters)
        output["bias"] = np.asarray(params["output"]["bias"], np.float64) + constant
    return {
        "value": _like(params["value"], {"kernel": value, "bias": bias}),
        "output": _like(params["output"], output),
    }


def _like(old: Params, new: dict[str, np.ndarray]) -> Params:
    """The leaves that there were, in their dtypes."""
    return {name: jnp.asarray(new[name], leaf.dtype) for name, leaf in old.items()}
