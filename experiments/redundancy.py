"""What is redundant in a model: do its heads look at the same tokens, and how many directions do keys and values fill?

    python experiments/redundancy.py $MODEL --calibration corpus.txt --seeds 0 --out runs/redundancy

Of every layer, on the first 4,096 tokens of the text in windows of 512 (or the model's context):

- sinks: the first token, and every other that gets a tenth or more of the attention of the 63 or more tokens after it,
  mean over heads. On them heads rest when they have nothing to do (Xiao et al. 2023, arXiv 2309.17453).
- how alike query heads attend: the correlation of their attention rows, centred over the keys that a row may read,
  with all tokens, without the first one (as `chai_jax.analyse.probe` compares heads), and without any sink. The last
  also between heads that read *different* texts: so much is a matter of positions alone, whatever the text says.
- how many of its numbers a key or a value needs for 99 % of its variance: keys before and after their rotation, and
  keys as queries weigh them (`chai_jax.compress.key_basis`), each head by itself and without the first four tokens.

CHAI shares one attention among heads that correlate at 0.95 or more (Agarwal et al. 2024, arXiv 2403.08058). Expected
of a well-trained model: heads look alike because they rest on the same sinks, and hardly otherwise.

Writes redundancy.json, .csv and .md, and for each model the pictures NAME-heads, NAME-layers and NAME-spectra.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from chai_jax.analyse.probe import centred, correlation_of
from chai_jax.compress.basis_stream import TOKENS, BasisStream
from chai_jax.compress.key_basis import observed, stored_tokens
from chai_jax.compress.moments import summed
from chai_jax.console import track
from chai_jax.data.batches import Windows
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.model.execution import Execution
from chai_jax.model.layerwise import anonymous, how_in_float32, seen_through
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.self_attention import positioned
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec
from chai_jax.report.figures import by_layer, pair_maps, spectrum
from chai_jax.report.tables import Column, percent
from lab.options import Common, Record, start
from lab.publish import publish

ALIKE, ENERGY, SINK = 0.95, 0.99, 0.1
READERS = 64  # of a sink at least: the last tokens are read by their neighbours alone
PAIRS = {
    "all": "all tokens",
    "first": "without the first token",
    "rest": "without sinks",
    "within": "without sinks: heads of one key",
    "closest": "without sinks: each head's closest",
    "other_text": "without sinks: different texts",
}
KEYS = ("keys", "keys, rotated", "keys, as queries weigh them", "values")
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("layer", lambda row: str(row["layer"])),
    ("attention to the first token", lambda row: percent(row["sink"])),
    ("to other sinks", lambda row: percent(row["sinks"])),
    *((f"correlation, {text}", partial(lambda name, row: shown(row[name]), name)) for name, text in PAIRS.items()),
    *((f"{name}: dimensions", partial(lambda name, row: f"{row['dimensions'][name]:.1f}", name)) for name in KEYS),
)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@dataclass(frozen=True)
class RedundancyOptions(Common):
    calibration: Path | None = None
    """A text file, plain or .gz."""


def other_sinks(attention: Float[Array, "B H T T"]) -> Bool[Array, "B T"]:
    """Which tokens but the first are sinks."""
    readers = jnp.arange(attention.shape[-1], 0, -1, dtype=jnp.float32)
    sinks = (attention.mean(axis=1).sum(axis=1) >= SINK * readers) & (readers >= READERS)
    return sinks.at[:, 0].set(False)


@partial(jax.jit, static_argnums=(0, 1, 2))
def where_sinks(
    config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Array, mask: Array
) -> Bool[Array, "B T"]:
    """The layer's `other_sinks`."""
    return other_sinks(seen_through(config, layer, how, params, x, mask)[1].probabilities)


@partial(jax.jit, static_argnums=(0, 1, 2))
def layer_sums(
    config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Array, mask: Array
) -> dict[str, Array]:
    """A layer's sums over a batch of whole windows: products of attention rows [Q, Q], and moments [C, R, R]."""
    seen, key, value, _ = observed(config, layer, how, params, x, mask)
    whole = mask[:, None, :, None]  # rows of windows that only fill up a batch count for nothing
    attention = jnp.where(whole, seen.probabilities, 0.0)
    sinks = other_sinks(attention)
    without_first = seen.allowed.at[:, :, 0].set(False)
    kept = {"all": seen.allowed, "first": without_first, "rest": without_first & ~sinks[:, None]}
    rows = {name: jnp.where(whole, centred(attention, keys[:, None]), 0.0) for name, keys in kept.items()}
    product = partial(jnp.einsum, precision="highest")
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), mask.shape)
    rotated = positioned(config, layer, params, key, key, positions)[1]
    stored = stored_tokens(mask)[:, None, :, None]
    found = {
        **{name: product("bhts,bgts->hg", each, each) for name, each in rows.items()},
        "other_text": product("bhts,bgts->hg", rows["rest"][:-1], rows["rest"][1:]),
        "windows": jnp.sum(mask[:, 0], dtype=jnp.float32),
        "others": jnp.sum(mask[1:, 0], dtype=jnp.float32),
        "sink": attention[:, :, 1:, 0].mean(axis=1).sum(),
        "sinks": jnp.where(sinks[:, None], attention.mean(axis=1), 0.0)[:, 1:].sum(),
        "read": jnp.sum(mask[:, 1:], dtype=jnp.float32),
        "count": stored.sum(dtype=jnp.float32),
    }
    for name, heads in zip(("keys", "keys, rotated", "values"), (key, rotated, value), strict=True):
        heads = jnp.where(stored, heads, 0.0)
        found[name] = product("bctr,bctq->crq", heads, heads)
        found[f"{name}: sum"] = heads.sum(axis=(0, 2))
    return found


def held(variances: Float[np.ndarray, "C R"]) -> Float[np.ndarray, " R"]:
    """What part of all variance the largest of each head hold, mean over heads, at 1 to R of them."""
    ordered = np.sort(np.maximum(variances, 0.0), axis=1)[:, ::-1]
    return np.mean(np.cumsum(ordered, axis=1) / ordered.sum(axis=1, keepdims=True), axis=0)


def dimensions(energies: Float[np.ndarray, " R"]) -> float:
    """How many hold `ENERGY`, between whole numbers by a line."""
    return float(np.interp(ENERGY, np.concatenate([[0.0], energies]), np.arange(len(energies) + 1)))


def variances(total: dict[str, np.ndarray], name: str) -> Float[np.ndarray, "C R"]:
    """Of one layer's keys or values, along the directions in which they vary."""
    mean = total[f"{name}: sum"] / total["count"]
    return np.linalg.eigvalsh(total[name] / total["count"] - mean[:, :, None] * mean[:, None])


def alike(total: dict[str, np.ndarray], queries: int) -> Record:
    """Medians over pairs of query heads, of which each `queries` read one key head."""
    heads = len(total["rest"])
    correlation = {name: correlation_of(total[name][None])[0] for name in ("all", "first", "rest")}
    norm, rest = np.sqrt(np.diag(total["rest"])), correlation["rest"]
    group, apart = np.arange(heads) // queries, ~np.eye(heads, dtype=bool)
    # Fewer pairs of windows than windows, which is made up for.
    other = total["other_text"] / np.outer(norm, norm) * total["windows"] / total["others"]
    return {
        **{name: float(np.median(each[apart])) for name, each in correlation.items()},
        "within": float(np.median(rest[apart & (group[:, None] == group)])) if queries > 1 else None,
        "closest": float(np.median(np.where(apart, rest, -1.0).max(axis=1))),
        "other_text": float(np.median(other[apart])),
        "pairs": int(apart.sum()) // 2,
        "alike": {name: int((each[apart] >= ALIKE).sum()) // 2 for name, each in correlation.items()},
        "correlation": rest,
    }


def layers(model: Model, text: Windows) -> Iterator[tuple[Record, dict[str, Float[np.ndarray, " R"]]]]:
    """Of each layer what is said of it, and the spectra of its keys and values."""
    stream, config = BasisStream(model, text), model.config
    for index in track(range(config.num_layers), "Reading layers"):
        about = config, anonymous(model.spec.layers[index]), how_in_float32(model)
        params = model.params["layers"][str(index)]
        total = summed(partial(layer_sums, *about), params, stream.x, stream.mask)
        energies = {name: held(variances(total, name)) for name in KEYS if name in total}
        energies[KEYS[2]] = held(stream.basis.error[0][None])  # what goes if a coordinate goes
        found = alike(total, config.queries) | {name: float(total[name] / total["read"]) for name in ("sink", "sinks")}
        at = np.asarray(where_sinks(*about, params, stream.x, stream.mask))
        tokens = (model.tokenizer.decode([int(token)]) for token in text.tokens.ravel()[: at.size][at.ravel()])
        found["tokens"] = dict(Counter(tokens).most_common())
        found["dimensions"] = {name: dimensions(energies[name]) for name in KEYS}
        yield found, energies
        stream.advance()


def drawn(options: RedundancyOptions, model: Model, rows: list[Record], energies: list[dict[str, np.ndarray]]) -> None:
    """The three pictures of a model; takes the matrices out of the rows."""
    path, text = options.out / rows[0]["model"], "4,096 tokens of calibration text."
    correlation = np.stack([row.pop("correlation") for row in rows])
    caption = f"Correlation of attention rows without sinks; boxes: heads that read one key head. {text}"
    pair_maps(path.with_name(f"{path.name}-heads"), correlation, model.config.queries, caption)
    lines = [
        ("correlation of attention, median over pairs", PAIRS[name], row, row[name]) for name in PAIRS for row in rows
    ]
    sinks = {"sink": "the first token", "sinks": f"other tokens that get {SINK:.0%} or more"}
    lines += [("part of the attention, mean over heads", sinks[name], row, row[name]) for name in sinks for row in rows]
    needed = f"dimensions, of {model.config.head_dim}, for {ENERGY:.0%} of the variance"
    lines += [(needed, name, row, row["dimensions"][name]) for name in KEYS for row in rows]
    panels = [
        {"what": what, "series": series, "layer": row["layer"], "value": value}
        for what, series, row, value in lines
        if value is not None
    ]
    by_layer(path.with_name(f"{path.name}-layers"), panels, text)
    spectra = [
        {"what": name, "layer": layer, "rank": rank, "energy": float(energy)}
        for name in KEYS
        for layer, each in enumerate(energies)
        for rank, energy in enumerate(each[name], 1)
    ]
    spectrum(path.with_name(f"{path.name}-spectra"), spectra, f"Mean over heads. {text}")


def said(rows: list[Record]) -> str:
    """One sentence of a model."""
    pairs = sum(row["pairs"] for row in rows)
    each = [
        f"{PAIRS[name]} {np.median([row[name] for row in rows]):.2f} ({sum(row['alike'][name] for row in rows)} at "
        f"{ALIKE} or more)"
        for name in ("all", "first", "rest")
    ]
    tokens: Counter[str] = sum((Counter(row["tokens"]) for row in rows), Counter())
    sinks = ", ".join(f"{token!r} {count}" for token, count in tokens.most_common(4))
    return (
        f"{rows[0]['model']}: correlation of {pairs} pairs of heads, median over layers of medians: {', '.join(each)}; "
        f"tokens that were other sinks, over all layers: {sinks or 'none'}"
    )


def redundancy(options: RedundancyOptions) -> Record:
    """All models, one after the other."""
    if options.calibration is None:
        raise InputError("expected --calibration FILE, a text")
    rows, findings = [], []
    for source in options.model:
        model = load(source)
        length = min(512, model.config.max_positions)
        cut = windows(model.tokenizer, read_text_file(options.calibration), length)[: TOKENS // length]
        if len(cut) < 2:
            raise InputError(f"{options.calibration} makes {len(cut)} windows of {length} tokens; expected two or more")
        text = Windows.stack([window.tokens for window in cut], model.config.pad_token_id)
        found = list(layers(model, text))
        mine = [{"model": Path(source).name, "layer": at, **row} for at, (row, _) in enumerate(found)]
        drawn(options, model, mine, [energies for _, energies in found])
        rows += mine
        findings.append(said(mine))
    return publish(options, "redundancy", "What is redundant", rows, COLUMNS, findings=findings)


if __name__ == "__main__":
    start(redundancy, RedundancyOptions, __doc__)
