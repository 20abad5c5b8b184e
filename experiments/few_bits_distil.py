"""What distillation wins back of a cache of few bits, with the cache in the loop.

    python experiments/few_bits_distil.py $MODEL --compressed fb/smollm2-20 fb/smollm2-15 --calibration corpus.txt \
        --updates 100 --seeds 0 --out runs/few-bits-distil
    python experiments/few_bits.py $MODEL ... --alone "" --budgets "" --compressed runs/few-bits-distil/smollm2-15 ...

Each model of --compressed (`experiments/few_bits.py --save` saves the planner's) learns the next-token distribution of
$MODEL with a bfloat16 cache, at a temperature of 1, on windows of the calibration text after those which plans are made
on. Keys and values pass through the cache's format in every forward pass; gradients pass straight through
(Bengio et al. 2013, arXiv 1308.3432). All weights train; the basis of the keys and the levels stay. The second command
measures what was saved as OUT/NAME.

State is saved every few minutes and a stopped script goes on from there. Expected: much of a loss above a per cent of
perplexity comes back, nothing of one below half a per cent. Writes few_bits_distil.json, .csv and .md: losses by update
and time.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from chai_jax.adapt.distil import distil
from chai_jax.config import Checkpoints, DistilConfig, TrainConfig
from chai_jax.console import console
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.files.store import load, save
from chai_jax.report.tables import Column
from lab.kept import kept
from lab.options import Common, Record, start
from lab.publish import publish

SKIPPED = 32  # windows of 512 tokens at the text's beginning, of which plans were made
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("updates", lambda row: str(row["updates"])),
    ("tokens of an update", lambda row: f"{row['tokens']:,}"),
    ("KL, first tenth of the updates", lambda row: f"{row['kl'][0]:.4f}"),
    ("last tenth", lambda row: f"{row['kl'][1]:.4f}"),
    ("seconds an update", lambda row: f"{row['seconds']:.1f}"),
)


@dataclass(frozen=True)
class DistilOptions(Common):
    compressed: tuple[str, ...] = ()
    """Folders of compressed models."""
    calibration: Path | None = None
    """The text to learn from: a file, plain or .gz."""
    updates: int = 100
    batch: int = 4
    """Windows of an update."""
    window: int = 512
    """Tokens of a window."""
    lr: float = 2e-5
    """Peak (first) learning rate."""
    alpha: float = 1.0
    """Part of the teacher in the loss; the rest is cross-entropy with the text."""
    compute: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations (default: the device's fast one)."""


def distilled(folder: str, options: DistilOptions) -> Record:
    """Train one model and save it beside the table; after a stop, losses and time are those of the rest."""
    (source,) = options.model
    student, teacher = load(folder), load(source, storage="bfloat16")
    assert options.calibration is not None
    text = read_text_file(options.calibration)
    cut = windows(student.tokenizer, text, options.window)[SKIPPED * 512 // options.window : -1]
    if len(cut) < options.batch:
        raise InputError(f"the text has {len(cut)} windows left; expected at least --batch {options.batch}: give more")
    train = TrainConfig(
        options.lr, options.batch, accumulation=1, epochs=10_000, max_steps=options.updates,
        max_examples=min(len(cut), options.updates * options.batch), weight_decay=0.0, seed=options.seed_numbers[0],
        compute=options.compute, remat=True,
    )  # fmt: skip
    losses: list[float] = []

    def log(entry: dict[str, Any]) -> None:
        losses.append(float(entry["kl"]))
        if len(losses) % 5 == 0:
            console.print(f"{name}: update {len(losses)}, KL {sum(losses[-5:]) / 5:.4f}")

    name, began = Path(folder).name, time.perf_counter()
    kept = Checkpoints(options.out / f"{name}.state", minutes=5.0, keep=1)
    config = DistilConfig(train, temperature=1.0, alpha=options.alpha)
    model = distil(student, teacher, cut, config, log, checkpoints=kept)
    seconds = (time.perf_counter() - began) / max(1, len(losses))
    save(model, options.out / name)
    part = max(1, len(losses) // 10)
    kl = [sum(some) / part for some in (losses[:part], losses[-part:])]
    tokens = options.batch * options.window
    return {"model": name, "updates": options.updates, "tokens": tokens, "kl": kl, "seconds": seconds, "all_kl": losses}


def few_bits_distil(options: DistilOptions) -> Record:
    """All models, one after the other."""
    if len(options.model) != 1 or not options.compressed or options.calibration is None:
        raise InputError("expected one MODEL, the teacher, --compressed FOLDER ... and --calibration FILE")
    names = ("calibration", "updates", "batch", "window", "lr", "alpha", "compute", "seeds")
    settings = {name: str(getattr(options, name)) for name in names}
    rows = [
        kept(
            options.out, {"teacher": options.model, "student": folder, **settings}, partial(distilled, folder, options)
        )
        for folder in options.compressed
    ]
    return publish(options, "few_bits_distil", "Few bits in the cache: distilled", rows, COLUMNS)


if __name__ == "__main__":
    start(few_bits_distil, DistilOptions, __doc__)
