"""A Hugging Face checkpoint's tensors <-> our parameter tree, in both directions, by one table of names and shapes.

The names are the family's (`chai_jax.files.families`), the shapes those that `declare` gives. torch keeps a linear map
as [out, in] with the heads folded into one axis; ours are [in, ..., out] with heads apart. Of OPT: q_proj.weight
[H*K, D] -> query.kernel [D, H, K], out_proj.weight [D, H*K] -> output.kernel [H, K, D], fc1.weight [F, D] -> up.kernel
[D, F]. So a map is transposed and reshaped, all else only reshaped.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.files.families.family import Family
from chai_jax.files.families.registry import family_of
from chai_jax.files.stored import Stored, check_floats, same_numbers
from chai_jax.model.params import Declared, Params, declare
from chai_jax.model.quantized import dequantize, is_leaf
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec


@dataclass(frozen=True)
class Entry:
    """A row of the table: a tensor's place in our tree, its name below the prefix, and both shapes."""

    path: tuple[str, ...]
    name: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    transposed: bool

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        return (x.T if self.transposed else x).reshape(self.ours)

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.theirs[::-1]).T if self.transposed else x.reshape(self.theirs)


def flatten(tree: Params) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    """The leaves of a parameter tree (quantized or `Declared` ones whole) with their paths, and its structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(tuple(key.key for key in path), leaf) for path, leaf in pairs], structure


def tensor_table(config: Architecture) -> list[Entry]:
    """Every tensor that a dense model of this architecture has, no more and no less."""
    family = family_of(config)
    return [_entry(path, family.tensor_name(path), declared) for path, declared in flatten(_declare(config))[0]]


def _declare(config: Architecture) -> Params:
    return declare(config, Spec.dense(config.num_layers, config.num_heads, config.head_dim))


def _entry(path: tuple[str, ...], name: str, declared: Declared) -> Entry:
    shape = declared.shape
    if declared.kind != "kernel":
        theirs = (math.prod(shape),) if declared.kind in ("bias", "scale") else shape
        return Entry(path, name, shape, theirs, transposed=False)
    # The input axes come first: heads and rank for the attention's output, else one.
    inputs = 2 if path[-2] == "output" else 1
    theirs = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
    return Entry(path, name, shape, theirs, transposed=True)


def _canonical(family: Family, tensors: dict[str, Stored]) -> dict[str, tuple[str, Stored]]:
    """Tensors by their name without prefix, with the name they had."""
    found: dict[str, tuple[str, Stored]] = {}
    for name, stored in tensors.items():
        short = name.removeprefix(next((prefix for prefix in family.prefixes if name.startswith(prefix)), ""))
        if short in family.ignored:
            continue
        if short in found:
            raise InputError(
                f"the weights hold {short!r:.100} twice, as {found[short][0]!r:.100} and {name!r:.100}: remove one"
            )
        found[short] = (name, stored)
    return found


def to_params(config: Architecture, tensors: dict[str, Stored], dtype: str | None = None) -> Params:
    """Read a dense model's parameters, leaf by leaf, in `dtype` or else in the dtypes that `read_finite` gives.

    `tensors` is emptied on the way, so that what a reader holds in memory goes as it is used.

    Raises:
        InputError: naming the tensor that is missing, unknown, there twice, misshapen, no float, or not finite; a
            stored lm_head that differs from the embedding it is tied to.
    """
    family = family_of(config)
    found, rows = _canonical(family, tensors), tensor_table(config)
    tensors.clear()
    _check_names(config, family, rows, found)
    arrays = []
    for row in track(rows, "reading weights"):
        name, stored = found.pop(row.name)
        arrays.append(jnp.array(row.to_ours(read_finite(name, stored, dtype))))
    return jax.tree.unflatten(jax.tree.structure(_declare(config)), arrays)


def _check_names(config: Architecture, family: Family, rows: list[Entry], found: dict[str, tuple[str, Stored]]) -> None:
    # A tied table may go by either name (safetensors keeps one of them), or be stored twice, as older torch does.
    head = found.pop(family.head, None) if config.tied else None
    if head is not None:
        found.setdefault(family.embedding, head)
    for row in rows:
        if row.name not in found:
            raise InputError(
                f"the weights lack {family.full_name(row.name)} {list(row.theirs)}, which config.json demands: fetch "
                "the model again"
            )
        name, stored = found[row.name]
        if stored.shape != row.theirs:
            raise InputError(
                f"{name} in {stored.file} is {list(stored.shape)!s:.100}; config.json demands {list(row.theirs)}: "
                "mend one of them"
            )
    if head is not None and head is not found[family.embedding]:
        _check_tied(head, found[family.embedding])
    unknown = sorted(found.keys() - {row.name for row in rows})
    if unknown:
        name, stored = found[unknown[0]]
        raise InputError(
            f"{stored.file} holds {name!r:.100}, which a model of this config.json has no place for: mend one of them"
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
    family = family_of(config)
    return {family.full_name(row.name): _export(row, tree[row.path]) for row in tensor_table(config)}


def _export(row: Entry, leaf: Any) -> Stored:
    quantized = is_leaf(leaf)

    def read() -> np.ndarray:
        return row.to_theirs(np.asarray(dequantize(leaf) if quantized else leaf))

    return Stored(row.theirs, "float32" if quantized else str(leaf.dtype), "", read)
