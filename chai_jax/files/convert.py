"""A Hugging Face checkpoint's tensors <-> our parameter tree, in both directions, by one table of names and shapes.

The names are the family's (`chai_jax.files.families`), the shapes those that `declare` gives. torch keeps a linear map
as [out, in] with the heads folded into one axis; ours are [in, ..., out] with heads apart. Of OPT: q_proj.weight
[H*K, D] -> query.kernel [D, H, K], out_proj.weight [D, H*K] -> output.kernel [H, K, D], fc1.weight [F, D] -> up.kernel
[D, F]. So a map is transposed and reshaped, all else only reshaped. Some families keep several maps in one tensor.
"""

import math
from collections.abc import Sequence
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
class Part:
    """A leaf of our tree, and what it is of a checkpoint's tensor.

    Attributes:
        outputs: rows of it in torch's [out, in].
        rest: the other axes of what is no map.
        order: of a rotary head's dimensions, where theirs is another than ours (see `chai_jax.model.rotary`).
    """

    path: tuple[str, ...]
    ours: tuple[int, ...]
    outputs: int
    is_map: bool
    rest: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        x = (x.T if self.is_map else x).reshape(self.ours)
        return x[..., list(self.order)] if self.order else x

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        if self.order:
            x = x[..., np.argsort(self.order)]
        return x.reshape(-1, self.outputs).T if self.is_map else x.reshape(self.outputs, *self.rest)


@dataclass(frozen=True)
class Entry:
    """A row of the table: a tensor's name below the prefix, its shape, and the leaves that it holds.

    Attributes:
        layout: `alone` (one leaf), `blocks` (one after the other) or `heads` (in turns, `heads` times).
        turned: whether it is [in, out].
    """

    name: str
    theirs: tuple[int, ...]
    parts: tuple[Part, ...]
    layout: str
    heads: int
    turned: bool

    def to_ours(self, x: np.ndarray) -> list[np.ndarray]:
        """The leaves of a tensor."""
        x = x.T if self.turned else x
        if self.layout == "heads":
            turns = x.reshape(self.heads, len(self.parts), -1, *x.shape[1:])
            pieces = [turns[:, at].reshape(part.outputs, *x.shape[1:]) for at, part in enumerate(self.parts)]
        else:
            pieces = np.split(x, np.cumsum([part.outputs for part in self.parts])[:-1])
        return [part.to_ours(piece) for part, piece in zip(self.parts, pieces, strict=True)]

    def to_theirs(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of these leaves."""
        pieces = [part.to_theirs(leaf) for part, leaf in zip(self.parts, leaves, strict=True)]
        if self.layout == "heads":
            pieces = [piece.reshape(self.heads, 1, -1, *piece.shape[1:]) for piece in pieces]
            x = np.concatenate(pieces, axis=1)
            x = x.reshape(-1, *x.shape[3:])
        else:
            x = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        return x.T if self.turned else x


def flatten(tree: Params) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    """The leaves of a parameter tree (quantized or `Declared` ones whole) with their paths, and its structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(tuple(key.key for key in path), leaf) for path, leaf in pairs], structure


def tensor_table(config: Architecture) -> list[Entry]:
    """Every tensor that a dense model of this architecture has, no more and no less."""
    family, parts = family_of(config), dict[str, list[Part]]()
    declared, order = dict(flatten(_declare(config))[0]), {name: at for at, name in enumerate(FUSED_ORDER)}
    for path, what in declared.items():
        parts.setdefault(family.tensor_name(path), []).append(_part(config, path, what))
    table = []
    for name, found in parts.items():
        mine = sorted(found, key=lambda part: order.get(part.path[-2], 0)) if len(found) > 1 else found
        first, layout = mine[0], family.layout(name)
        rest = (math.prod(first.ours) // first.outputs,) if first.is_map else first.rest
        theirs = (sum(part.outputs for part in mine), *rest)
        turned = family.turned and first.is_map
        theirs = theirs[::-1] if turned else theirs
        table.append(Entry(name, theirs, tuple(mine), layout, config.kv_heads, turned))
    return table


FUSED_ORDER = ("query", "key", "value", "gate", "up")  # in one tensor


def _declare(config: Architecture) -> Params:
    return declare(config, Spec.of(config))


def _part(config: Architecture, path: tuple[str, ...], declared: Declared) -> Part:
    shape, order = declared.shape, tuple[int, ...]()
    if path[-2] in ("query", "key", "query_norm", "key_norm"):
        order = _head_order(config)
    if declared.kind in ("bias", "scale"):
        return Part(path, shape, math.prod(shape), is_map=False, order=order)
    if declared.kind == "embedding":
        return Part(path, shape, shape[0], is_map=False, rest=shape[1:])
    # The input axes come first: heads and rank for the attention's output, else one.
    inputs = 2 if path[-2] == "output" else 1
    return Part(path, shape, math.prod(shape[inputs:]), is_map=True, order=order)


def _head_order(config: Architecture) -> tuple[int, ...]:
    """Where the dimensions of our rotary heads are in a checkpoint's, whose turning part is by itself; (): in place."""
    if config.rotary is None or config.rotary.fraction == 1:
        return ()
    size = int(config.head_dim * config.rotary.fraction)
    turning, rest = np.arange(size), np.arange(size, config.head_dim)
    halves = zip(np.split(turning, 2), np.split(rest, 2), strict=True)
    return tuple(np.concatenate([part for pair in halves for part in pair]).tolist())


def _canonical(family: Family, tensors: dict[str, Stored]) -> dict[str, tuple[str, Stored]]:
    """Tensors by their name without prefix, with the name they had."""
    found: dict[str, tuple[str, Stored]] = {}
    for name, stored in tensors.items():
        short = name.removeprefix(next((prefix for prefix in family.prefixes if name.startswith(prefix)), ""))
        if family.means_nothing(short):
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
    arrays: dict[tuple[str, ...], Any] = {}
    for row in track(rows, "reading weights"):
        name, stored = found.pop(row.name)
        leaves = row.to_ours(read_finite(name, stored, dtype))
        arrays |= {part.path: jnp.array(leaf) for part, leaf in zip(row.parts, leaves, strict=True)}
    declared, structure = flatten(_declare(config))
    return jax.tree.unflatten(structure, [arrays[path] for path, _ in declared])


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
    return {
        family.full_name(row.name): _export(row, [tree[part.path] for part in row.parts])
        for row in tensor_table(config)
    }


def _export(row: Entry, leaves: Sequence[Any]) -> Stored:
    kinds = {"float32" if is_leaf(leaf) else str(leaf.dtype) for leaf in leaves}
    dtype = kinds.pop() if len(kinds) == 1 else "float32"

    def read() -> np.ndarray:
        arrays = (np.asarray(dequantize(leaf) if is_leaf(leaf) else leaf) for leaf in leaves)
        return row.to_theirs([array.astype(jnp.dtype(dtype), copy=False) for array in arrays])

    return Stored(row.theirs, dtype, "", read)
