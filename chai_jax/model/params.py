"""The parameters of an OPT: the shape of the model, and the tree that shape and spec demand."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from chai_jax.model.quantized import Leaf, Quantized, QuantizedArray
from chai_jax.spec import LayerSpec, Spec

POSITION_OFFSET = 2  # the position table's first two rows are padding's

Params = dict[str, Any]


@dataclass(frozen=True)
class OPTConfig:
    """The shape of an OPT; names as in the field, values as in the checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    max_positions: int
    embed_dim: int
    pre_norm: bool = True
    remove_final_norm: bool = False
    bias: bool = True
    activation: str = "relu"
    norm_affine: bool = True
    tied: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2  # one, several, or none
    pad_token_id: int = 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def final_norm(self) -> bool:
        """Post-norm models end in their last layer's norm; pre-norm ones have one more, unless it was removed."""
        return self.pre_norm and not self.remove_final_norm


@dataclass(frozen=True)
class Declared:
    """What a leaf of the parameter tree must be: its shape and the logical name of each axis."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kind: str = "kernel"  # kernel | bias | scale | embedding: how it is initialised


def declare(config: OPTConfig, spec: Spec) -> Params:
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


def init(config: OPTConfig, spec: Spec, key: Array, std: float = 0.02) -> Params:
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
