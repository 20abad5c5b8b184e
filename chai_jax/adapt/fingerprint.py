"""What a checkpoint belongs to: everything that decides the state after an update, as JSON to save beside it.

Arrays enter by a checksum that is exact and the same on every mesh, since addition modulo 2^32 has no order.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from chai_jax.data.batches import Encoded
from chai_jax.inputs.reading import Record
from chai_jax.model.model import Model

MISSING = "nothing"


def training_fingerprint(
    stage: str, settings: Any, model: Model, encoded: Sequence[Encoded], order: Iterable[np.ndarray], state: Any
) -> Record:
    """Stage, settings, model, data and their order; what `checksums` says of the weights is added by the caller.

    Args:
        settings: the stage's dataclass.
        state: the state of training or its shapes.
    """
    record = {
        "stage": stage,
        "settings": dataclasses.asdict(settings),
        "model": {name: part for name, part in dataclasses.asdict(model.config).items() if name in model.config.stated},
        "spec": model.spec.to_json(),
        "plan": None if model.plan is None else model.plan.to_json(),
        "state": {name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in named(state).items()},
        "examples": hash_arrays(part for one in encoded for part in (one.tokens, (one.start,))),
        "order": hash_arrays(order),
    }
    return json.loads(json.dumps(record))


def first_difference(before: Any, now: Any, name: str = "") -> str | None:
    """Where two JSON values first differ, as `name: one there, other here`; None if they are equal."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        pairs = [(str(key), before.get(key, MISSING), now.get(key, MISSING)) for key in {**now, **before}]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(str(at), *pair) for at, pair in enumerate(zip(before, now, strict=True))]
    else:
        return None if before == now else f"{name} is {before!r} there and {now!r} here"
    found = (first_difference(old, new, f"{name}.{key}".lstrip(".")) for key, old, new in pairs)
    return next((difference for difference in found if difference), None)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, as in `masters.layers.0.up.kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def checksums(tree: Any) -> dict[str, int]:
    """A checksum of every array of a tree, by its path; one flipped bit changes it."""
    return {name: int(value) for name, value in jax.device_get(_checksums(named(tree))).items()}


@jax.jit
def _checksums(leaves: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


def _checksum(x: Array) -> UInt32[Array, ""]:
    """The sum over all elements of bits (2 index + 1) modulo 2^32; odd factors lose no bit."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):  # not by reshaping, which would gather a split array
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def hash_arrays(arrays: Iterable[Any]) -> str:
    """SHA-256 of integer arrays and their lengths."""
    digest = hashlib.sha256()
    for array in arrays:
        values = np.asarray(array, np.int64)
        digest.update(np.int64(values.size).tobytes() + values.tobytes())
    return digest.hexdigest()
