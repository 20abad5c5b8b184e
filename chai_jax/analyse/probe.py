"""What the attention heads of a dense model do on calibration text: running sums, layer after layer.

Mean softmax attention is 1/S for every head and says nothing, so heads are compared by the *deviations* of their
attention rows (CHAI, Agarwal et al. 2024, arXiv 2403.08058, sections 3.1 and 3.2): each row is centred over the keys
it may read, without the first token, on which heads rest when they have nothing to do (the sink of Xiao et al. 2023,
arXiv 2309.17453).
"""

import dataclasses
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, jaxtyped

from chai_jax.compress.slice import of_heads
from chai_jax.console import track
from chai_jax.data.batches import Windows
from chai_jax.data.text import windows as cut
from chai_jax.data.tokens import require_tokenizer
from chai_jax.errors import InputError
from chai_jax.files.atomic import new_file
from chai_jax.inputs.reading import open_regular, reason, shown
from chai_jax.model.execution import Execution
from chai_jax.model.layerwise import anonymous, embed_text, how_in_float32, seen_through
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import dequantize
from chai_jax.model.self_attention import Seen
from chai_jax.model.sharding import whole
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec

HeadSums = dict[str, Array]
MOST_PROBE_BYTES = 2**30  # bytes of a saved probe, unpacked, at most


@dataclass(frozen=True, eq=False)
class Probe:
    """Statistics of every layer's heads, in the model's original head order, and the text they come from.

    A head is a key, a value and the queries that read it; queries of two heads are compared one by one, in their order.

    Attributes:
        attention: G[h, g] = sum over query rows of the dot product of the centred attention rows of heads h and g.
        outputs: sum over tokens of the dot product of what heads h and g add to the layer's output (after the output
            projection, without its bias): the squared output norm of a cluster is the sum of its block.
        scores: mean absolute pre-softmax score, after 1/sqrt(K), over allowed pairs and heads.
        tokens: the calibration windows, padded on the right.
        mask: True where a token is real.
        fingerprint: of the probed model (see `fingerprint`).
        queries: as `attention`, of the model's query heads; None where each head has one.
    """

    attention: Float[np.ndarray, "L H H"]
    outputs: Float[np.ndarray, "L H H"]
    scores: Float[np.ndarray, " L"]
    tokens: Int32[np.ndarray, "N W"]
    mask: Bool[np.ndarray, "N W"]
    fingerprint: str
    queries: Float[np.ndarray, "L Q Q"] | None = None

    @property
    def rows(self) -> int:
        """Query rows (real tokens) summed over."""
        return int(self.mask.sum())

    @property
    def correlation(self) -> Float[np.ndarray, "L H H"]:
        """G / sqrt(G_hh G_gg): 1 where two heads always attend alike, 0 for a head that is flat on all rows."""
        return correlation_of(self.attention)

    def save(self, path: str | Path) -> None:
        """Write the probe as an .npz file."""
        with new_file(Path(path)) as temporary, temporary.open("wb") as file:
            fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
            np.savez_compressed(file, **{name: value for name, value in fields.items() if value is not None})

    @classmethod
    def load(cls, path: str | Path) -> "Probe":
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not one that `save` wrote.
        """
        try:
            fields = _read_arrays(path)
        except Exception as error:  # of damaged files zipfile, zlib and NumPy raise nearly anything
            raise InputError(
                f"cannot read the probe {shown(path)} ({reason(error)}); expected a file that Probe.save wrote: probe "
                "again"
            ) from None
        return cls(**{**fields, "fingerprint": str(fields["fingerprint"])})


def correlation_of(attention: Float[np.ndarray, "L H H"]) -> Float[np.ndarray, "L H H"]:
    """See `Probe.correlation`; of key heads or of query heads."""
    norm = np.sqrt(np.einsum("lhh->lh", attention))
    scale = norm[:, :, None] * norm[:, None, :]
    return np.divide(attention, scale, out=np.zeros_like(attention), where=scale > 0)


def _read_arrays(path: str | Path) -> dict[str, Any]:
    """The arrays of a saved probe, each of the shape and type that its field declares, its statistics finite."""
    found: dict[str, Any] = {}
    with open_regular(path) as file, zipfile.ZipFile(file) as packed, jaxtyped("context"):
        if sum(member.file_size for member in packed.infolist()) > MOST_PROBE_BYTES:
            raise ValueError(f"more than {MOST_PROBE_BYTES:,} bytes")
        for field in dataclasses.fields(Probe):
            kind: Any = field.type
            if field.name == "queries":
                if "queries.npy" not in packed.namelist():  # one query a head, or a probe of an earlier version
                    continue
                kind = Float[np.ndarray, "L Q Q"]
            with packed.open(f"{field.name}.npy") as member:
                array = found[field.name] = np.lib.format.read_array(member, allow_pickle=False)
            if kind is str:
                fits = array.shape == () and array.dtype.kind == "U"
            else:
                fits = isinstance(array, kind) and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))
            if not fits:
                raise ValueError(f"{field.name} is {array.dtype.name} {list(array.shape)}, or not finite")
    return found


def probe(
    model: Model, texts: Sequence[str] | Sequence[Sequence[int]], *, window: int = 256, batch_size: int = 8
) -> Probe:
    """Look at a dense model's heads on calibration text (never the text that is evaluated).

    Args:
        texts: strings, each cut into windows that start with `</s>`; or windows of token ids, taken as they are.
        window: tokens of a window at most; never more than the model has positions.
        batch_size: windows of one forward pass; rounded up to what the model's layout splits a batch into.

    Raises:
        InputError: a model that is clustered, a window of ids that is too long, or too little text.
    """
    if not model.spec.is_dense:
        raise InputError("the model's heads are merged already; expected a dense model: probe the one it was made from")
    window = min(window, model.config.max_positions)
    text = Windows.stack(_windows(model, texts, window), model.config.pad_token_id)
    tokens, mask = text.tokens, text.mask
    ways = model.how.layout.ways
    sums = _accumulate(model, _batches(tokens, mask, -(-batch_size // ways) * ways))
    pairs = sum(count * (count + 1) // 2 for count in mask.sum(axis=1).tolist())
    return Probe(
        attention=_in_head_order(model.spec, sums["attention"]),
        outputs=_in_head_order(model.spec, sums["outputs"]),
        scores=sums["scores"] / (pairs * model.config.num_heads),
        tokens=tokens,
        mask=mask,
        fingerprint=fingerprint(model),
        queries=_in_head_order(model.spec, sums["queries"], model.config.queries) if "queries" in sums else None,
    )


def _windows(model: Model, texts: Sequence[str] | Sequence[Sequence[int]], window: int) -> list[list[int]]:
    """Token windows of two tokens or more; a text's windows do not overlap."""
    if isinstance(texts, str):
        raise InputError("texts is one string; expected a list of strings: put it in brackets")
    windows: list[list[int]] = []
    for text in texts:
        if isinstance(text, str):
            tokenizer = require_tokenizer(model.tokenizer, model.source)
            windows += [list(part.tokens) for part in cut(tokenizer, text, window)]
        elif len(text) <= window:
            windows.append(list(text))
        else:
            raise InputError(f"a window of {len(text)} tokens is longer than {window}: cut it")
    windows = [tokens for tokens in windows if len(tokens) > 1]
    if not any(len(tokens) > 2 for tokens in windows):
        raise InputError("the calibration text has no window of three tokens; expected some sentences: give more text")
    return windows


def _batches(tokens: np.ndarray, mask: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of one shape: rows that are missing from the last are masked out."""
    room = ((0, -len(tokens) % size), (0, 0))
    tokens, mask = np.pad(tokens, room), np.pad(mask, room)
    return [(tokens[at : at + size], mask[at : at + size]) for at in range(0, len(tokens), size)]


def fingerprint(model: Model) -> str:
    """A hash of a model's configuration and of every byte of its weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def centred(probabilities: Float[Array, "B H T S"], keys: Bool[Array, "B #H T S"]) -> Float[Array, "B H T S"]:
    """Rows of attention over these keys, each less its mean over them; zero elsewhere."""
    counts = jnp.maximum(keys.sum(axis=-1, keepdims=True, dtype=jnp.float32), 1.0)
    rows = jnp.where(keys, probabilities, 0.0)
    return jnp.where(keys, rows - rows.sum(axis=-1, keepdims=True) / counts, 0.0)


def head_sums(seen: Seen, params: Params) -> HeadSums:
    """One layer's sums over a batch, of which padding may stand on either side."""
    # A token may read itself unless it is padding, so the diagonal is the mask.
    real = jnp.diagonal(seen.allowed, axis1=1, axis2=2)
    first = real & (jnp.cumsum(real, axis=1, dtype=jnp.int32) == 1)
    pairs = seen.allowed & real[:, :, None]
    rows = centred(seen.probabilities, (pairs & ~first[:, None, :])[:, None])
    heads = jnp.where(real[:, None, :, None], seen.heads, 0.0).astype(jnp.float32)
    kernel = dequantize(params["output"]["kernel"])
    # sum_t <o_h W_h, o_g W_g> from second moments: head outputs in the width, [B, H, T, D], need never exist.
    moment = jnp.einsum("bhtr,bgtq->hrgq", heads, heads, precision="highest")
    metric = jnp.einsum("hrd,gqd->hrgq", kernel, kernel, precision="highest")
    attention = jnp.einsum("bhts,bgts->hg", rows, rows, precision="highest")
    outputs, n = jnp.sum(moment * metric, axis=(1, 3)), len(attention) // params["key"]["kernel"].shape[-2]
    by_head = -1, n, len(attention) // n, n  # heads and their queries, twice
    return {
        "attention": jnp.einsum("hjgj->hg", attention.reshape(by_head)) if n > 1 else attention,
        "outputs": outputs.reshape(by_head).sum(axis=(1, 3)) if n > 1 else outputs,
        "scores": jnp.sum(jnp.where(pairs[:, None], jnp.abs(seen.scores), 0.0)),
        **({"queries": attention} if n > 1 else {}),
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def _layer_sums(
    config: Architecture,
    layer: LayerSpec,
    how: Execution,
    params: Params,
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T D"], HeadSums]:
    """What leaves a layer that `x` enters, and the layer's sums."""
    after, seen = seen_through(config, layer, how, params, x, mask)
    return after, head_sums(seen, params)


def _accumulate(model: Model, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Sum over batches in float64; each statistic is stacked over layers.

    Layer after layer, in float32 whatever the device computes in otherwise: the same model gets the same plan
    everywhere, and of weights in half precision no more than one layer's are ever there in float32.
    """
    totals: dict[str, np.ndarray] = {}
    how = how_in_float32(model)
    layout = how.layout
    placed = model.replace(params=layout.params(model.config, model.spec, model.params))
    for batch in track(batches, "Probing the heads"):
        tokens, mask = layout.rows(batch)
        x, found = embed_text(placed, tokens, mask), []
        for index, layer in enumerate(model.spec.layers):
            own = placed.params["layers"][str(index)]
            x, sums = _layer_sums(model.config, anonymous(layer), how, own, x, mask)
            found.append(sums)
        layers = whole(found)
        for name in layers[0]:
            totals[name] = totals.get(name, 0) + np.stack([layer[name] for layer in layers]).astype(np.float64)
    return totals


def _in_head_order(spec: Spec, stored: Float[np.ndarray, "L H H"], each: int = 1) -> Float[np.ndarray, "L H H"]:
    """Undo the order in which each layer stores its heads (quantizing a dense model may have sorted them by format)."""
    out = np.empty_like(stored)
    for index, layer in enumerate(spec.layers):
        heads = of_heads([heads[0] for heads in layer.clusters], each)
        out[index][np.ix_(heads, heads)] = stored[index]
    return out
