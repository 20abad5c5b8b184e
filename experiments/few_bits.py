"""What few bits in the cache cost: every format by itself, and the planner's mixtures at several budgets.

    python experiments/few_bits.py $MODEL --text wiki.test.raw --calibration corpus.txt --seeds 0 --out runs/few-bits

On the first --windows windows of the text, of --window tokens: the KL divergence of the next-token distribution from
the dense model's with a bfloat16 cache, and the change of perplexity, each with a 95 % interval over windows. Plans are
made on windows of the calibration text, which may share nothing with the text, without merges and without training.
Sizes are summed from allocated arrays: of one more token, and of a whole sequence of --window tokens with the first
tokens and the block in progress, which stay in bfloat16, as a fraction of the dense bfloat16 cache.

Expected of a well-trained model: values bear three bits, keys (per channel, after their rotation) four; two bits are
ruinous for keys. Writes few_bits.json, .csv and .md, and the planner's measurements, which the next call reads back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from chai_jax.analyse.budget import Budget, plan_within
from chai_jax.analyse.probe import probe
from chai_jax.compress.basis_stream import basis_plan
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.console import track
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.evaluation.statistics import paired
from chai_jax.files.store import load
from chai_jax.model.cache import empty
from chai_jax.model.model import Model
from chai_jax.plans.formats import BASIS, BLOCKS
from chai_jax.report.tables import Column
from chai_jax.score.divergence import kl_divergence
from lab.options import Common, Record, start
from lab.publish import publish

CALIBRATION, PROBED = 16, 512  # windows, and tokens of each
ALONE = ((4.0, "basis4"), (2.4, "basis4"), (2.4, "basis3"), (1.9, "basis3"), (2.4, "basis2"), (1.5, "basis2"))
ROWS = 4  # windows at once
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("cache", lambda row: row["cache"]),
    ("a token, % of bfloat16", lambda row: f"{100 * row['token']:.1f}"),
    ("a window, %", lambda row: f"{100 * row['sequence']:.1f}"),
    ("KL, nats [95 %]", lambda row: "{:.4f} [{:.4f}, {:.4f}]".format(*row["kl"])),
    ("perplexity, change % [95 %]", lambda row: "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["perplexity_change"])),
    ("predicted KL", lambda row: "" if row["predicted"] is None else f"{row['predicted']:.4f}"),
)


@dataclass(frozen=True)
class FewBitsOptions(Common):
    text: Path | None = None
    """What damage is measured on: a text file, plain or .gz."""
    calibration: Path | None = None
    """What plans are made on: another one."""
    windows: int = 64
    window: int = 512
    """Tokens of a window."""
    budgets: str = "0.27,0.23,0.2,0.17"
    """Of the planner: bytes of a token as fractions of the dense bfloat16 cache, with commas."""
    tokens: int = 2048
    """Of the calibration text, to measure on."""


def candidates(model: Model, options: FewBitsOptions) -> Iterator[tuple[str, Model, float | None]]:
    """Caches by name, and the damage that the planner predicts."""
    for storage in ("int8", *BLOCKS):
        if storage not in BASIS:
            yield storage, with_storage(model, storage), None
    assert options.calibration is not None
    cut = windows(model.tokenizer, read_text_file(options.calibration), PROBED)[:CALIBRATION]
    seen = probe(model, [window.tokens for window in cut], window=PROBED)
    for bits, storage in ALONE:
        yield f"{storage}, keys {bits:g} bits", quantize(model, basis_plan(model, seen, bits, storage), seen), None
    formats = ("int8", "k4v4", *BASIS)
    for part in [float(part) for part in options.budgets.split(",") if part]:
        budget = Budget(part, shares=(), storages=formats, ranks=False, tokens=options.tokens)
        file = options.out / f"{Path(model.source).name}.costs.json"
        made = plan_within(model, seen, budget, seed=options.seed_numbers[0], file=file)
        yield f"planner, {100 * part:g} %", quantize(model, made, seen), made.predicted


@jax.jit
def compared(truth: Array, logits: Array, targets: Array) -> tuple[Array, Array]:
    """Sums over each window [B] of the KL, and of the rise of the loss, nats."""
    right, wrong = jax.nn.log_softmax(truth), jax.nn.log_softmax(logits)
    rise = jnp.take_along_axis(right - wrong, targets[..., None], -1)[..., 0]
    return kl_divergence(right, wrong).sum(axis=1), rise.sum(axis=1)


def damage(model: Model, changed: Sequence[Model], tokens: np.ndarray) -> np.ndarray:
    """Mean KL and rise of the loss of each window: [models, 2, windows]."""
    found: list[list[np.ndarray]] = [[] for _ in changed]
    for first in track(range(0, len(tokens), ROWS), "Reading windows"):
        rows = jnp.asarray(tokens[first : first + ROWS])
        truth = model(rows)[:, :-1]
        for each, results in zip(changed, found, strict=True):
            results.append(np.asarray(compared(truth, each(rows)[:, :-1], rows[:, 1:])))
    return np.stack([np.concatenate(results, axis=1) for results in found]) / (tokens.shape[1] - 1)


def few_bits(options: FewBitsOptions) -> Record:
    """All models, one after the other."""
    if options.text is None or options.calibration is None or options.windows < 2:
        raise InputError("expected --text FILE, --calibration FILE and at least two --windows")
    rows: list[Record] = []
    for source in options.model:
        model = load(source, storage="bfloat16")
        cut = windows(model.tokenizer, read_text_file(options.text), options.window)[: options.windows]
        tokens = np.asarray([one.tokens for one in cut if len(one.tokens) == options.window], np.int32)
        caches = list(candidates(model, options))
        dense = empty(model.spec, 1, options.window).nbytes
        measured = damage(model, [changed for _, changed, _ in caches], tokens)
        for (name, changed, predicted), (kl, rise) in zip(caches, measured, strict=True):
            low, high = paired(np.zeros_like(kl), kl).difference_interval
            change = paired(np.zeros_like(rise), rise)
            nats = (change.difference, *change.difference_interval)
            rows.append(
                {
                    "model": Path(source).name,
                    "cache": name,
                    "n": len(tokens),
                    "token": changed.kv_bytes_per_token / model.kv_bytes_per_token,
                    "sequence": empty(changed.spec, 1, options.window).nbytes / dense,
                    "kl": [float(kl.mean()), low, high],
                    "perplexity_change": [100 * float(np.expm1(x)) for x in nats],
                    "predicted": predicted,
                }
            )
    return publish(options, "few_bits", "Few bits in the cache", rows, COLUMNS)


if __name__ == "__main__":
    start(few_bits, FewBitsOptions, __doc__)
