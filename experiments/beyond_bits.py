"""What three further methods could save at most, beside a cache of few bits, on one model.

    python experiments/beyond_bits.py $MODEL --calibration corpus.txt --seeds 0 --out runs/beyond-bits

Everything is fitted to one half of the windows and judged on the other, with the ridge that is best there: bounds, not
promises. Layers see what the dense model gives them.

1. **Foretelling from the layer below** (AQUA-KV, Shutova et al. 2025, arXiv 2501.19392): keys and values are what a
   linear map of the layer below's foretells, and a rest of few bits. The map reads exact keys and values here, not few
   bits, so this is a bound. Saved bits a number: half the log2 of the ratio of the determinants of the
   covariances, of what is stored and of the rest (a Gaussian source at a high rate); keys before their rotation, values
   beside their own keys. Both are also what reading costs: two maps of all the layer's keys and values a token.
2. **Rounding with error feedback** (GPTQ, Frantar et al. 2022, arXiv 2210.17323): a value's numbers are rounded one
   after the other, each taking up what the errors before it do to the output. With H = L D L' the weight of errors, the
   expected damage goes from tr(H) to tr(D). For keys in a basis H is diagonal by construction: nothing to win.
3. **Refitting the output projection** to what the changed attention mixes, in closed form (ridge): the part of the
   squared error of the layer's output that goes, for each format of --storages in this layer alone.

Writes beyond_bits.json, .csv and .md: a row a layer, and their mean.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from chai_jax.compress.key_basis import observed, stored_tokens
from chai_jax.compress.moments import summed
from chai_jax.compress.quantize import with_storage
from chai_jax.console import track
from chai_jax.data.batches import Windows
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.model.execution import Execution
from chai_jax.model.few_bits import hadamard
from chai_jax.model.layerwise import anonymous, embed_text, how_in_float32, through
from chai_jax.model.model import Model
from chai_jax.model.params import Params
from chai_jax.model.quantized import dequantize
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import STORAGES
from chai_jax.plans.spec import LayerSpec
from chai_jax.report.tables import Column, percent
from chai_jax.run.options import parse_list
from lab.options import Common, Record, start
from lab.publish import publish

RIDGES = (1e-6, 1e-4, 1e-2, 1.0)  # of a covariance's mean variance; the best on the windows to judge is taken
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("layer", lambda row: str(row["layer"])),
    ("below: bits a number of keys", lambda row: f"{row['keys']:.2f}"),
    ("of values", lambda row: f"{row['values']:.2f}"),
    ("feedback: damage of values that stays", lambda row: percent(row["feedback"])),
    (
        "refit: error that stays",
        lambda row: ", ".join(f"{name} {percent(part)}" for name, part in row["refit"].items()),
    ),
)


@dataclass(frozen=True)
class BeyondOptions(Common):
    calibration: Path | None = None
    """A text file, plain or .gz."""
    windows: int = 32
    """Of 512 tokens; half of them to fit, half to judge."""
    storages: str = "k3v3,k3v2"
    """Formats whose output projections are refitted, with commas."""


Moments = tuple[np.ndarray, np.ndarray]  # means of z z' over the windows to fit and those to judge


@partial(jax.jit, static_argnums=(0, 1, 2))
def stored(config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Array, mask: Array) -> Array:
    """A layer's keys and values side by side, [B, T, 2 C R]."""
    _, key, value, _ = observed(config, layer, how, params, x, mask)
    return jnp.concatenate([jnp.swapaxes(part, 1, 2).reshape(*mask.shape, -1) for part in (key, value)], axis=-1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def mixed(config: Architecture, layer: LayerSpec, how: Execution, params: Params, x: Array, mask: Array) -> Array:
    """What the heads of a layer mix, side by side, [B, T, Q R]."""
    heads = observed(config, layer, how, params, x, mask)[0].heads
    return jnp.swapaxes(heads, 1, 2).reshape(*mask.shape, -1)


def halves(parts: list[Array], counts: Array) -> Moments:
    """Moments of [1, parts] over each half of the windows, in float64."""

    @jax.jit
    def products(_: None, z: Array, mask: Array) -> Array:
        z = jnp.where(mask[..., None], z, 0.0)
        return jnp.einsum("btn,btm->nm", z, z, precision="highest")

    z = jnp.concatenate([jnp.ones((*counts.shape, 1)), *parts], axis=-1)
    z, half, all_ = jnp.where(counts[..., None], z, 0.0), len(counts) // 2, np.ones(counts.shape, bool)
    both = [summed(products, None, z[some], all_[some]) for some in (slice(half), slice(half, None))]
    return both[0] / both[0][0, 0], both[1] / both[1][0, 0]


def rest(moments: Moments, wanted: slice, known: list[slice], ridge: float) -> Float[np.ndarray, "n n"]:
    """Second moments, over the windows to judge, of what an affine map of `known` leaves of `wanted`."""
    from_, to = np.r_[(slice(0, 1), *known)], np.r_[wanted]
    fit, judge = moments
    inner = fit[np.ix_(from_, from_)]
    penalty = ridge * np.trace(inner) / len(inner) * np.eye(len(inner))
    penalty[0, 0] = 0.0  # the constant
    map_ = np.linalg.solve(inner + penalty, fit[np.ix_(from_, to)])
    both = judge[np.ix_(from_, to)]
    left = judge[np.ix_(to, to)] - both.T @ map_ - map_.T @ both + map_.T @ judge[np.ix_(from_, from_)] @ map_
    return np.asarray(left)


def best(both: Moments, wanted: slice, known: list[slice], more: slice) -> float:
    """Bits a number that knowing `more` saves of `wanted`, beside what is known."""

    def size(known: list[slice]) -> float:
        return min(float(np.linalg.slogdet(rest(both, wanted, known, ridge))[1]) for ridge in RIDGES)

    return (size(known) - size([*known, more])) / (2 * np.log(2) * (wanted.stop - wanted.start))


def from_below(config: Architecture, both: Moments) -> tuple[float, float]:
    """Bits a number that the layer below saves of keys and of values; z = [1, keys, values, those below]."""
    size, rank = config.kv_heads * config.head_dim, config.head_dim
    below = slice(1 + 2 * size, 1 + 4 * size)
    keys, values = [], []
    for head in range(config.kv_heads):
        key = slice(1 + head * rank, 1 + (head + 1) * rank)
        value = slice(key.start + size, key.stop + size)
        keys.append(best(both, key, [], below))
        values.append(best(both, value, [key], below))
    return float(np.mean(keys)), float(np.mean(values))


def feedback(config: Architecture, params: Params) -> float:
    """tr(D) / tr(H) of values that are turned by a Hadamard matrix; H = the sum of W W' over a key head's queries."""
    kernel = np.asarray(dequantize(params["output"]["kernel"]), np.float64)
    kernel = kernel.reshape(config.kv_heads, -1, config.head_dim, kernel.shape[-1])
    turn = np.asarray(hadamard(config.head_dim), np.float64)
    found = []
    for weight in np.einsum("cqrd,cqkd->crk", kernel, kernel):
        turned = turn @ weight @ turn.T
        factor = np.linalg.cholesky(turned + 1e-9 * np.trace(turned) * np.eye(len(turned)))
        found.append((np.diag(factor) ** 2).sum() / np.trace(turned))
    return float(np.mean(found))


def refitted(both: Moments, kernel: np.ndarray) -> float:
    """Squared error of the output with a refitted projection over that with the old one; z = [1, error, new mixed].

    The best projection is the old one of the best estimate of the old mixture, which is the new one less its error.
    """
    size = len(kernel)
    error, new = slice(1, 1 + size), slice(1 + size, 1 + 2 * size)
    left = [np.sum((rest(both, error, [new], ridge) @ kernel) * kernel) for ridge in RIDGES]
    return float(min(left) / np.sum((both[1][error, error] @ kernel) * kernel))


def layers(model: Model, options: BeyondOptions) -> Iterator[Record]:
    """A row a layer."""
    assert options.calibration is not None
    cut = windows(model.tokenizer, read_text_file(options.calibration), 512)[: options.windows]
    text = Windows.stack([window.tokens for window in cut], model.config.pad_token_id)
    mask, how, config = jnp.asarray(text.mask), how_in_float32(model), model.config
    counts = stored_tokens(mask)
    few = {name: with_storage(model, name) for name in parse_list("--storages", options.storages, STORAGES)}
    x, below = embed_text(model, text.tokens, mask), None
    for index in track(range(config.num_layers), "Layers"):
        params = model.params["layers"][str(index)]
        kernel = np.asarray(dequantize(params["output"]["kernel"]), np.float64)
        kernel = kernel.reshape(-1, kernel.shape[-1])

        def of(make: Callable[..., Array], spec: LayerSpec, params: Params = params, x: Array = x) -> Array:
            about = partial(make, config, anonymous(spec), how, params)
            return jnp.concatenate([about(x[at : at + 4], mask[at : at + 4]) for at in range(0, len(x), 4)])

        dense = model.spec.layers[index]
        own, heads = of(stored, dense), of(mixed, dense)
        keys, values = (0.0, 0.0) if below is None else from_below(config, halves([own, below], counts))
        refit = {
            name: refitted(halves([new - heads, new], counts), kernel)
            for name, new in ((name, of(mixed, each.spec.layers[index])) for name, each in few.items())
        }
        yield {"layer": index, "keys": keys, "values": values, "feedback": feedback(config, params), "refit": refit}
        x, below = through(model, index, x, mask), own


def beyond_bits(options: BeyondOptions) -> Record:
    """All models, one after the other."""
    if options.calibration is None or options.windows < 4:
        raise InputError("expected --calibration FILE and at least four --windows")
    rows: list[Record] = []
    for source in options.model:
        found = list(layers(load(source, storage="bfloat16"), options))
        means = {name: float(np.mean([row[name] for row in found])) for name in ("keys", "values", "feedback")}
        refit = {name: float(np.mean([row["refit"][name] for row in found])) for name in found[0]["refit"]}
        rows += [{"model": Path(source).name, **row} for row in (*found, {"layer": "mean", **means, "refit": refit})]
    return publish(options, "beyond_bits", "What further methods could save", rows, COLUMNS)


if __name__ == "__main__":
    start(beyond_bits, BeyondOptions, __doc__)
