"""The one table of names and shapes: a Hugging Face OPT's tensors <-> our parameter tree, in both directions.

torch keeps a linear map as [out, in] with the heads folded into one axis; ours are [in, ..., out] with heads apart:
q_proj.weight [H*K, D] -> query.kernel [D, H, K], out_proj.weight [D, H*K] -> output.kernel [H, K, D], fc1.weight
[F, D] -> up.kernel [D, F]. So a map is transposed and reshaped, all else only reshaped.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.files.stored import Stored, check_floats, same_numbers
from chai_jax.model.params import Declared, Params, declare
from chai_jax.model.quantized import dequantize, is_leaf
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

PREFIXES = ("model.decoder.", "decoder.", "")
# A format number that fairseq's checkpoints carry into some conversions; transformers drops it as well.
IGNORED = "version"
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
TENSORS = {
    ("embed", "tokens"): EMBEDDING,
    ("embed", "positions"): "embed_positions.weight",
    ("project_in", "kernel"): "project_in.weight",
    ("project_out", "kernel"): "project_out.weight",
    ("head", "kernel"): HEAD,
}
MODULES = {
    "final_norm": "final_layer_norm",
    "attention_norm": "self_attn_layer_norm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}


@dataclass(frozen=True)
class Entry:
    """A row of the table: a tensor's place in our tree, its name below "model.decoder.", and both shapes."""

    path: tuple[str, ...]
    name: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    transposed: bool

    @property
    def full_name(self) -> str:
        return self.name if self.name == HEAD else PREFIXES[0] + self.name

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        return (x.T if self.transposed else x).reshape(self.ours)

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.theirs[::-1]).T if self.transposed else x.reshape(self.theirs)


def flatten(tree: Params) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    """The leaves of a parameter tree (quantized or `Declared` ones whole) with their paths, and its structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(tuple(key.key for key in path), leaf) for path, leaf in pairs], structure


def table(config: Architecture) -> list[Entry]:
    """Every tensor that a dense OPT of this configuration has, no more and no less."""
    return [_entry(path, declared) for path, declared in flatten(_declare(config))[0]]


def _declare(config: Architecture) -> Params:
    return declare(config, Spec.dense(config.num_layers, config.num_heads, config.head_dim))


def _entry(path: tuple[str, ...], declared: Declared) -> Entry:
    shape = declared.shape
    if path in TENSORS:
        name = TENSORS[path]
    else:
        *parents, module, leaf = path
        name = ".".join([*parents, MODULES[module], "bias" if leaf == "bias" else "weight"])
    if declared.kind != "kernel":
        theirs = (math.prod(shape),) if declared.kind in ("bias", "scale") else shape
        return Entry(path, name, shape, theirs, transposed=False)
    # The input axes come first: heads and rank for the attention's output, else one.
    inputs = 2 if path[-2] == "output" else 1
    theirs = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
    return Entry(path, name, shape, theirs, transposed=True)


def _canonical(tensors: dict[str, Stored]) -> dict[str, tuple[str, Stored]]:
    """Tensors by their name without prefix, with the name they had."""
    found: dict[str, tuple[str, Stored]] = {}
    for name, stored in tensors.items():
        short = name.removeprefix(next(prefix for prefix in PREFIXES if name.startswith(prefix)))
        if short in found:
            raise InputError(
                f"the weights hold {short!r:.100} twice, as {found[short][0]!r:.100} and {name!r:.100}: remove one"
            )
        found[short] = (name, stored)
    return found


def to_params(config: Architecture, tensors: dict[str, Stored], dtype: str | None = None) -> Params:
    """Read a dense OPT's parameters, leaf by leaf, in `dtype` or else in the dtypes that `read_finite` gives.

    `tensors` is emptied on the way, so that what a reader holds in memory goes as it is used.

    Raises:
        InputError: naming the tensor that is missing, unknown, there twice, misshapen, no float, or not finite; a
            stored lm_head that differs from the embedding it is tied to.
    """
    found = _canonical(tensors)
    tensors.clear()
    rows = table(config)
    _check_names(config, rows, found)
    arrays = []
    for row in track(rows, "reading weights"):
        name, stored = found.pop(row.name)
        arrays.append(jnp.array(row.to_ours(read_finite(name, stored, dtype))))
    return jax.tree.unflatten(jax.tree.structure(_declare(config)), arrays)


def _check_names(config: Architecture, rows: list[Entry], found: dict[str, tuple[str, Stored]]) -> None:
    found.pop(IGNORED, None)
    # A tied table may go by either name (safetensors keeps one of them), or be stored twice, as older torch does.
    head = found.pop(HEAD, None) if config.tied else None
    if head is not None:
        found.setdefault(EMBEDDING, head)
    for row in rows:
        if row.name not in found:
            raise InputError(
                f"the weights lack {row.full_name} {list(row.theirs)}, which config.json demands: fetch the model again"
            )
        name, stored = found[row.name]
        if stored.shape != row.theirs:
            raise InputError(
                f"{name} in {stored.file} is {list(stored.shape)!s:.100}; config.json demands {list(row.theirs)}: "
                "mend one of them"
            )
    if head is not None and head is not found[EMBEDDING]:
        _check_tied(head, found[EMBEDDING])
    unknown = sorted(found.keys() - {row.name for row in rows})
    if unknown:
        name, stored = found[unknown[0]]
        raise InputError(
            f"{stored.file} holds {name!r:.100}, which an OPT of this config.json has no place for: mend one of them"
        )


def _check_tied(head: tuple[str, Stored], embedding: tuple[str, Stored]) -> None:
    """Readers would disagree on a stored head that differs from the table it is tied to."""
    for name, stored in (head, embedding):
        check_floats(name, stored)
    if not same_numbers(head[1], embedding[1]):
        raise InputError(
            f"{head[0]} differs from {embedding[0]}, but config.json ties them; expected equal tensors: remove one, or "
            "set tie_word_embeddings to false"
        )


def read_finite(name: str, stored: Stored, dtype: str | None = None) -> np.ndarray:
    """A tensor's numbers, all finite, in `dtype` or else in their own; float64 becomes float32.

    Raises:
        InputError: the tensor is none of `READ_FLOATS`; it holds, or comes to hold, a NaN or an infinity.
    """
    check_floats(name, stored)
    x = stored.read()
    _check_finite(f"{name} in {stored.file} holds", x, "fetch the model again")
    dtype = dtype or ("float32" if stored.dtype == "float64" else stored.dtype)
    if dtype != stored.dtype:
        with np.errstate(over="ignore"):
            x = x.astype(jnp.dtype(dtype))
        _check_finite(f"{name} in {stored.file}, as {dtype}, holds", x, "choose a dtype of more range")
    return x


def _check_finite(what: str, x: np.ndarray, remedy: str) -> None:
    if not np.isfinite(x).all():
        number = "a NaN" if np.isnan(x).any() else "an infinity"
        raise InputError(f"{what} {number}; expected finite numbers: {remedy}")


def to_hf(config: Architecture, params: Params) -> dict[str, Stored]:
    """A dense model's tensors by Hugging Face name, each made when it is read; quantized leaves become float32."""
    tree = dict(flatten(params)[0])
    return {row.full_name: _export(row, tree[row.path]) for row in table(config)}


def _export(row: Entry, leaf: Any) -> Stored:
    quantized = is_leaf(leaf)

    def read() -> np.ndarray:
        return row.to_theirs(np.asarray(dequantize(leaf) if quantized else leaf))

    return Stored(row.theirs, "float32" if quantized else str(leaf.dtype), "", read)
