"""The parameters of an OPT: the shape of the model, and the tree that shape and spec demand."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from chai_jax.model.quantized import Leaf, Quantized, QuantizedArray
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec

POSITION_OFFSET = 2  # the position table's first two rows are padding's

Params = dict[str, Any]


@dataclass(frozen=True)
class Declared:
    """What a leaf of the parameter tree must be: its shape and the logical name of each axis."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kind: str = "kernel"  # kernel | bias | scale | embedding: how it is initialised


def declare(config: Architecture, spec: Spec) -> Params:
    """The parameter tree of a model as `Declared` leaves: one source for initialising, loading and sharding."""
    width, table = config.hidden_size, (config.vocab_size, config.embed_dim)

    def norm() -> Params:
        if not config.norm_affine:
            return {}
        return {"scale": Declared((width,), ("width",), "scale"), "bias": Declared((width,), ("width",), "bias")}

    def linear(shape: tuple[int, ...], axes: tuple[str, ...], outputs: int, bias: bool = config.bias) -> Params:
        leaves = {"kernel": Declared(shape, axes)}
        if bias:
            leaves["bias"] = Declared(shape[-outputs:], axes[-outputs:], "bias")
        return leaves

    def block(layer: LayerSpec) -> Params:
        def heads(count: int, rank: int) -> Params:
            return linear((width, count, rank), ("width", "heads", "rank"), 2)

        ffn = config.ffn_dim
        queries, keys, values, outputs = layer.projected
        return {
            "attention_norm": norm(),
            "query": heads(queries, layer.key_rank),
            "key": heads(keys, layer.key_rank),
            "value": heads(values, layer.value_rank),
            "output": linear((outputs, layer.value_rank, width), ("heads", "rank", "width"), 1),
            "mlp_norm": norm(),
            "up": linear((width, ffn), ("width", "ffn"), 1),
            "down": linear((ffn, width), ("ffn", "width"), 1),
        }

    tree: Params = {
        "embed": {
            "tokens": Declared(table, ("vocab", "embed"), "embedding"),
            "positions": Declared((config.max_positions + POSITION_OFFSET, width), ("position", "width"), "embedding"),
        },
        "layers": {str(index): block(layer) for index, layer in enumerate(spec.layers)},
    }
    if config.embed_dim != width:
        tree["project_in"] = linear((config.embed_dim, width), ("embed", "width"), 1, bias=False)
        tree["project_out"] = linear((width, config.embed_dim), ("width", "embed"), 1, bias=False)
    if config.final_norm:
        tree["final_norm"] = norm()
    if not config.tied:
        tree["head"] = {"kernel": Declared(table, ("vocab", "embed"), "embedding")}
    return tree


@partial(jax.jit, static_argnames=("std", "shape"))
def _normal(key: Array, std: float, shape: tuple[int, ...]) -> Array:
    """Compiled by itself, once a shape: on GPUs a draw takes XLA half a second, and a model has hundreds."""
    return std * jax.random.normal(key, shape)


def init(config: Architecture, spec: Spec, key: Array, std: float = 0.02) -> Params:
    """Random parameters as OPT's: normal(0, 0.02) kernels and embeddings, zero biases, unit norms; float32."""
    declared, treedef = jax.tree.flatten(declare(config, spec), is_leaf=lambda leaf: isinstance(leaf, Declared))
    keys = jax.random.split(key, len(declared))

    def leaf(what: Declared, key: Array) -> Array:
        if what.kind == "bias":
            return jnp.zeros(what.shape)
        if what.kind == "scale":
            return jnp.ones(what.shape)
        return _normal(key, std, what.shape)

    return jax.tree.unflatten(treedef, [leaf(what, key) for what, key in zip(declared, keys, strict=True)])


PROJECTIONS = ("query", "key", "value")


def fold_projections(params: Params) -> Params:
    """The same model with one matrix `qkv` [D, F] a layer in place of query, key and value: one matmul, not three.

    F counts entries of all queries, then keys, then values. A layer whose three kernels are not of one kind, plain or
    int8, stays as it is, and so does one with int4 kernels. For one device: split arrays do not stay split.
    """

    def flat(kernels: Sequence[Any]) -> Array:
        return jnp.concatenate([kernel.reshape(len(kernel), -1) for kernel in kernels], axis=1)

    def side_by_side(kernels: Sequence[Any]) -> Leaf | None:
        if all(isinstance(kernel, QuantizedArray) for kernel in kernels):
            scale = jnp.concatenate([kernel.scale.ravel() for kernel in kernels])
            return QuantizedArray(flat([kernel.values for kernel in kernels]), scale, (-2,))
        return None if any(isinstance(kernel, Quantized) for kernel in kernels) else flat(kernels)

    def layer(old: Params) -> Params:
        three = [old[name] for name in PROJECTIONS]
        kernel = side_by_side([each["kernel"] for each in three])
        if kernel is None:
            return old
        bias = {"bias": jnp.concatenate([each["bias"].ravel() for each in three])} if "bias" in three[0] else {}
        return {name: leaf for name, leaf in old.items() if name not in PROJECTIONS} | {
            "qkv": {"kernel": kernel, **bias}
        }

    return params | {"layers": {index: layer(old) for index, old in params["layers"].items()}}
