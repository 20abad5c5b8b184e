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

from chai_jax.adapt.distil import distil
from chai_jax.config import DistilConfig
from chai_jax.errors import InputError
from chai_jax.files.store import load, save
from chai_jax.report.tables import Column
from lab.kept import kept
from lab.options import Record, start
from lab.publish import publish
from lab.teaching import Teaching, state_of, told

COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("updates", lambda row: str(row["updates"])),
    ("tokens of an update", lambda row: f"{row['tokens']:,}"),
    ("KL, first tenth of the updates", lambda row: f"{row['kl'][0]:.4f}"),
    ("last tenth", lambda row: f"{row['kl'][1]:.4f}"),
    ("seconds an update", lambda row: f"{row['seconds']:.1f}"),
)


@dataclass(frozen=True)
class DistilOptions(Teaching):
    compressed: tuple[str, ...] = ()
    """Folders of compressed models."""


def distilled(folder: str, options: DistilOptions) -> Record:
    """Train one model and save it beside the table; after a stop, losses and time are those of the rest."""
    (source,) = options.model
    student, teacher = load(folder), load(source, storage="bfloat16")
    cut = options.examples(student)
    name, began = Path(folder).name, time.perf_counter()
    losses, log = told(name, "kl")
    train = options.train_config(len(cut), options.seed_numbers[0])
    config = DistilConfig(train, temperature=1.0, alpha=options.alpha)
    with state_of(options.out / name) as state:
        model = distil(student, teacher, cut, config, log, checkpoints=state)
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
    settings = options.settings | {"seed": options.seed_numbers[0]}
    rows = [
        kept(
            options.out, {"teacher": options.model, "student": folder, **settings}, partial(distilled, folder, options)
        )
        for folder in options.compressed
    ]
    return publish(options, "few_bits_distil", "Few bits in the cache: distilled", rows, COLUMNS)


if __name__ == "__main__":
    start(few_bits_distil, DistilOptions, __doc__)
