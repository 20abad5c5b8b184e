"""What few bits in the cache cost: every format by itself, and the planner's mixtures at several budgets.

    python experiments/few_bits.py $MODEL --text wiki.test.raw --calibration corpus.txt --seeds 0 --out runs/few-bits

On the first --windows windows of the text, of --window tokens: the KL divergence of the next-token distribution from
the dense model's with a bfloat16 cache, and the change of perplexity, each with a 95 % interval over windows. Plans are
made on windows of the calibration text, which may share nothing with the text, without merges and without training.
Sizes are summed from allocated arrays: of one more token, and of a whole sequence of --window tokens with the first
tokens and the block in progress, which stay in bfloat16, as a fraction of the dense bfloat16 cache.

Expected of a well-trained model: values bear three bits, keys (per channel, after their rotation) four; two bits are
ruinous for keys, but in a basis 2.4 are enough. Writes few_bits.json, .csv and .md, a picture, the plans, and the
planner's measurements, which the next call reads back. The bound is that of `experiments/lab/bound.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chai_jax.analyse.budget import Budget, parts
from chai_jax.analyse.probe import Probe
from chai_jax.analyse.whole_plan import plan_and_measure
from chai_jax.compress.basis_stream import basis_plan
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.errors import InputError
from chai_jax.files.atomic import write_json
from chai_jax.files.store import load, save
from chai_jax.model.model import Model
from chai_jax.plans.formats import BASIS, BLOCKS, STORAGES, UNFITTED
from chai_jax.plans.plan import Plan
from chai_jax.report.tables import Column
from chai_jax.run.options import parse_list
from lab.bound import least, spectra
from lab.damage import COLUMNS, ROWS, damage, figures, frontier, layer_by_layer, sizes, whole_windows
from lab.options import Common, Record, start
from lab.publish import publish
from lab.texts import PROBED, calibrated

ALONE = ("int8", *(name for name in BLOCKS if name in UNFITTED))
IN_BASIS = ("basis4:4", "basis4:2.4", "basis3:2.4", "basis3:1.7", "basis2:2.4", "basis2:1.7")
PLANNED: tuple[Column, ...] = (
    ("predicted KL", lambda row: "" if row["predicted"] is None else f"{row['predicted']:.4f}"),
    ("of the whole plan, calibration text", lambda row: "" if row["whole"] is None else f"{row['whole']:.4f}"),
    ("bound", lambda row: f"{row['bound']:.4f}"),
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
    alone: str = ",".join((*ALONE, *IN_BASIS))
    """Formats by themselves, with commas; of a basis with the bits of a key's number, basis3:2.4."""
    budgets: str = "0.5,0.31,0.27,0.23,0.2,0.17,0.15"
    """Of the planner: bytes of a token as fractions of the dense bfloat16 cache, with commas."""
    compressed: tuple[str, ...] = ()
    """Folders of models that were compressed (and trained) elsewhere, each as it was saved."""
    save: bool = False
    """Save each of the planner's models, compressed, as the folder OUT/NAME-PERCENT."""
    formats: str = ",".join(BASIS)
    """That the planner chooses from, with commas; above a third of the cache int8 is worth adding."""
    tokens: int = 2048
    """Of the calibration text, to measure on."""


def wanted(options: FewBitsOptions, part: float) -> Budget:
    """What the planner chooses from."""
    formats = tuple(parse_list("--formats", options.formats, STORAGES))
    return Budget(part, shares=(), storages=formats, ranks=False, tokens=options.tokens)


def candidates(model: Model, seen: Probe, options: FewBitsOptions) -> Iterator[tuple[str, Model, Plan | None]]:
    """Caches by name, and the planner's plans, which hold what it expects."""
    alone = [each for each in options.alone.split(",") if each]
    for storage in alone:
        if ":" not in storage:
            yield storage, with_storage(model, storage), None
    for storage, bits in (each.split(":") for each in alone if ":" in each):
        plan = basis_plan(model, seen, float(bits), storage)
        yield f"{storage}, keys {bits} bits", quantize(model, plan, seen), None
    for part in [float(part) for part in options.budgets.split(",") if part]:
        file = options.out / f"{Path(model.source).name}.costs.json"
        made = plan_and_measure(model, seen, wanted(options, part), seed=options.seed_numbers[0], file=file)
        write_json(options.out / f"{Path(model.source).name}.plan-{100 * part:g}.json", made.to_json())
        changed = quantize(model, made, seen)
        folder = options.out / f"{Path(model.source).name}-{100 * part:g}"
        if options.save and not folder.exists():
            save(changed, folder)
        yield f"planner, {100 * part:g} %", changed, made
    for folder in options.compressed:
        yield Path(folder).name, load(folder), None


def few_bits(options: FewBitsOptions) -> Record:
    """All models, one after the other."""
    if options.text is None or options.calibration is None or options.windows < 2:
        raise InputError("expected --text FILE, --calibration FILE and at least two --windows")
    rows: list[Record] = []
    for source in options.model:
        model = load(source, storage="bfloat16")
        tokens = whole_windows(model.tokenizer, options.text, options.window, options.windows)
        seen = calibrated(model, options.calibration)
        caches, rows_at_once = list(candidates(model, seen, options)), max(1, ROWS * PROBED // options.window)
        run = [layer_by_layer(each) for each in (model, *(changed for _, changed, _ in caches))]
        measured = damage(run[0], run[1:], tokens, rows_at_once)
        known = spectra(model, *parts(model.config, seen, wanted(options, 1.0)))
        for (name, changed, plan), (kl, rise) in zip(caches, measured, strict=True):
            about = {"model": Path(source).name, "cache": name} | sizes(changed, model, options.window)
            planned = {"predicted": plan and plan.predicted, "whole": plan and plan.measured}
            rows.append(about | figures(kl, rise) | planned | {"bound": least(known, 16 * about["token"])})
    kinds = ["planner" if row["predicted"] else "basis" if "keys" in row["cache"] else "one format" for row in rows]
    caption = f"{options.windows} windows of {options.window} tokens; bars: 95 % intervals over windows. No training."
    frontier(options.out / "frontier", rows, kinds, caption)
    return publish(options, "few_bits", "Few bits in the cache", rows, (*COLUMNS, *PLANNED))


if __name__ == "__main__":
    start(few_bits, FewBitsOptions, __doc__)
