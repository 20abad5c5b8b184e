"""The parameters of a decoder: the tree that its architecture and its spec demand."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from chai_jax.model.quantized import Leaf, Quantized, QuantizedArray
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.channels import count_channels
from chai_jax.plans.spec import LayerSpec, Spec

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

    def norm(size: int = width, axis: str = "width") -> Params:
        kinds = ("scale", "bias") if config.norm == "layer" else ("scale",)
        return {kind: Declared((size,), (axis,), kind) for kind in kinds if config.norm_affine}

    def linear(shape: tuple[int, ...], axes: tuple[str, ...], outputs: int, bias: bool) -> Params:
        leaves = {"kernel": Declared(shape, axes)}
        if bias:
            leaves["bias"] = Declared(shape[-outputs:], axes[-outputs:], "bias")
        return leaves

    def block(layer: LayerSpec) -> Params:
        def heads(name: str, count: int, rank: int) -> Params:
            return linear((width, count, rank), ("width", "heads", "rank"), 2, config.has_bias(name))

        def wide(name: str) -> Params:
            return linear((width, config.ffn_dim), ("width", "ffn"), 1, config.has_bias(name))

        queries, keys, values, outputs = layer.projected
        output = ("heads", "rank", "width")
        return {
            "attention_norm": norm(),
            "query": heads("query", queries, layer.key_rank),
            "key": heads("key", keys, layer.key_rank),
            **{name: norm(layer.key_rank, "rank") for name in ("query_norm", "key_norm") if config.qk_norm},
            "value": heads("value", values, layer.value_rank),
            "output": linear((outputs, layer.value_rank, width), output, 1, config.has_bias("output")),
            **({"basis": _basis(layer)} if layer.channels else {}),
            "mlp_norm": norm(),
            **({"gate": wide("gate")} if config.gated else {}),
            "up": wide("up"),
            "down": linear((config.ffn_dim, width), ("ffn", "width"), 1, config.has_bias("down")),
        }

    tree: Params = {
        "embed": {"tokens": Declared(table, ("vocab", "embed"), "embedding")},
        "layers": {str(index): block(layer) for index, layer in enumerate(spec.layers)},
    }
    if config.rotary is None:
        positions = (config.max_positions + config.position_offset, width)
        tree["embed"]["positions"] = Declared(positions, ("position", "width"), "embedding")
    if config.embed_dim != width:
        tree["project_in"] = linear((config.embed_dim, width), ("embed", "width"), 1, bias=False)
        tree["project_out"] = linear((width, config.embed_dim), ("width", "embed"), 1, bias=False)
    if config.final_norm:
        tree["final_norm"] = norm()
    if not config.tied:
        tree["head"] = {"kernel": Declared(table, ("vocab", "embed"), "embedding")}
    return tree


def _basis(layer: LayerSpec) -> Params:
    """Of a layer whose keys are cached in a basis, see `chai_jax.model.basis`."""
    keys, kept = layer.key_heads, count_channels(layer.channels)
    shapes = {
        "mean": (keys, layer.key_rank),
        "into": (keys, layer.key_rank, kept),
        "back": (keys, kept, layer.key_rank),
        "values": (keys, kept, layer.value_rank),
        "offset": (keys, layer.value_rank),
    }
    axes = ("heads", "rank", "rank")
    return {name: Declared(shape, axes[: len(shape)]) for name, shape in shapes.items()}


@partial(jax.jit, static_argnames=("std", "shape"))
def _normal(key: Array, std: float, shape: tuple[int, ...]) -> Array:
    """Compiled by itself, once a shape: on GPUs a draw takes XLA half a second, and a model has hundreds."""
    return std * jax.random.normal(key, shape)


def init(config: Architecture, spec: Spec, key: Array, std: float = 0.02) -> Params:
    """Random parameters: normal(0, 0.02) kernels and embeddings, zero biases, unit norms; float32."""
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
