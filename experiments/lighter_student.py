"""CHAI-KD for a lighter student: what a teacher buys a model of half the layers, at equal updates.

    python experiments/lighter_student.py $MODEL --text wiki.test.raw --calibration corpus.txt --updates 200 --seeds 0 \
        --out runs/students
    python experiments/few_bits_tasks.py $MODEL --compressed runs/students/NAME-taught-0 ... --seeds 0 --out runs/asked

The student has $MODEL's embeddings and --layers of its layers, evenly chosen with the first and the last (so begin the
students of Sanh et al. 2019, arXiv 1910.01108). It is trained on the text twice, on the same windows in the same order:
`alone` by cross-entropy with the text, and `taught` by alpha T^2 KL(teacher || student) + (1 - alpha) CE with $MODEL as
teacher. Nothing else differs. Beside them is the student before training.

Damage is measured against $MODEL as in `few_bits.py`. Each student is saved as OUT/NAME-HOW-SEED for the second
command, and state is saved every few minutes. Expected: neither comes near the teacher in a few hundred updates; the
taught one is nearer. Writes lighter_student.json, .csv and .md.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from chai_jax.adapt.distil import distil
from chai_jax.adapt.finetune import finetune
from chai_jax.config import DistilConfig, FinetuneConfig
from chai_jax.errors import InputError
from chai_jax.evaluation.statistics import paired
from chai_jax.files.store import load, save
from chai_jax.model.model import Model
from chai_jax.report.tables import Column
from lab.damage import COLUMNS, ROWS, WEIGHTS, damage, figures, layer_by_layer, sizes, whole_windows
from lab.kept import kept
from lab.options import Record, start
from lab.publish import publish
from lab.teaching import Teaching, state_of, told

TRAINED: tuple[Column, ...] = (
    ("updates", lambda row: str(row["updates"])),
    ("seconds an update", lambda row: f"{row['seconds']:.1f}" if row["updates"] else "-"),
)


@dataclass(frozen=True)
class StudentOptions(Teaching):
    text: Path | None = None
    """What damage is measured on: a text file, plain or .gz."""
    layers: float = 0.5
    """Part of the layers that the student keeps."""
    updates: int = 200
    lr: float = 3e-4
    """Peak (first) learning rate."""
    alpha: float = 0.5
    """Part of the teacher in the loss; the rest is cross-entropy with the text."""
    temperature: float = 2.0
    """At which teacher and student are compared."""
    windows: int = 64
    """Windows of 512 tokens that damage is measured on."""


def keep_layers(model: Model, chosen: list[int]) -> Model:
    """A model of these layers, in their order."""
    windows = tuple(model.config.windows[index] for index in chosen) if model.config.windows else ()
    return model.replace(
        config=dataclasses.replace(model.config, num_layers=len(chosen), windows=windows),
        spec=dataclasses.replace(model.spec, layers=tuple(model.spec.layers[index] for index in chosen)),
        params=model.params
        | {"layers": {str(at): model.params["layers"][str(index)] for at, index in enumerate(chosen)}},
    )


def trained(name: str, how: str, seed: int, begun: Model, teacher: Model, options: StudentOptions) -> Record:
    """Train one student and save it; after a stop, the time is that of the rest."""
    cut = options.examples(begun)
    folder, began = f"{name}-{how}-{seed}", time.perf_counter()
    losses, log = told(folder, "loss")
    train = options.train_config(len(cut), seed)
    with state_of(options.out / folder) as state:
        if how == "taught":
            config = DistilConfig(train, temperature=options.temperature, alpha=options.alpha)
            student = distil(begun, teacher, cut, config, log, checkpoints=state)
        else:
            student = finetune(begun, cut, FinetuneConfig(train), log, checkpoints=state)
        seconds = (time.perf_counter() - began) / max(1, len(losses))
        save(student, options.out / folder)
    return {"updates": options.updates, "tokens": options.batch * options.window, "seconds": seconds, "losses": losses}


def students(source: str, options: StudentOptions) -> tuple[list[Record], list[str]]:
    """The rows of one teacher, and what its teaching was worth, seed by seed."""
    teacher, name = load(source, storage="bfloat16"), Path(source).name
    count = round(options.layers * teacher.config.num_layers)
    if not 1 <= count < teacher.config.num_layers:
        raise InputError(
            f"--layers {options.layers} keeps {count} of {teacher.config.num_layers}; expected some, and not all"
        )
    begun = keep_layers(teacher, np.linspace(0, teacher.config.num_layers - 1, count).round().astype(int).tolist())
    settings = options.settings | {"layers": str(options.layers), "temperature": str(options.temperature)}
    made: dict[str, tuple[Model, Record]] = {f"{count} layers, not trained": (begun, {"updates": 0})}
    for seed in options.seed_numbers:
        for how in ("alone", "taught"):
            about = settings | {"teacher": source, "student": f"{name}-{how}-{seed}"}
            done = kept(options.out, about, partial(trained, name, how, seed, begun, teacher, options))
            made[f"{count} layers, {how}, seed {seed}"] = (load(str(options.out / about["student"])), done)
    assert options.text is not None
    tokens = whole_windows(teacher.tokenizer, options.text, 512, options.windows)
    measured = damage(layer_by_layer(teacher), [layer_by_layer(model) for model, _ in made.values()], tokens, ROWS)
    rows, rises = [], dict(zip(made, measured[:, 1], strict=True))
    for (row, (model, done)), (kl, rise) in zip(made.items(), measured, strict=True):
        about = {"model": name, "cache": row, **sizes(model, teacher, 512), "weights": model.nbytes / teacher.nbytes}
        rows.append(about | done | figures(kl, rise))
    return rows, [worth(name, count, seed, rises) for seed in options.seed_numbers]


def worth(name: str, count: int, seed: int, rises: dict[str, np.ndarray]) -> str:
    """A sentence: the taught student's perplexity against the one trained alone, paired by window."""
    found = paired(*(rises[f"{count} layers, {how}, seed {seed}"] for how in ("alone", "taught")))
    change, low, high = (100 * float(np.expm1(nats)) for nats in (found.difference, *found.difference_interval))
    return (
        f"{name}, seed {seed}: with a teacher, perplexity changes by {change:+.1f} [{low:+.1f}, {high:+.1f}] % of that "
        "without."
    )


def lighter_student(options: StudentOptions) -> Record:
    """All teachers, one after the other."""
    if options.text is None or options.calibration is None or options.windows < 2:
        raise InputError("expected --text FILE, --calibration FILE and at least two --windows")
    rows, findings = [], []
    for source in options.model:
        mine, found = students(source, options)
        rows += mine
        findings += found
    columns = (("student", COLUMNS[1][1]), *COLUMNS[2:3], WEIGHTS, *TRAINED, *COLUMNS[5:])
    return publish(options, "lighter_student", "A student of fewer layers", rows, columns, findings=findings)


if __name__ == "__main__":
    start(lighter_student, StudentOptions, __doc__)
