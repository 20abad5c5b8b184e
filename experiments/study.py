"""What a smaller cache costs: every way to compress it, against its bytes, before and after distillation.

    python experiments/study.py $MODEL --data-dir $DATA --train-text $TEXT --test-text $DATA/wikitext2/test.raw.txt.gz \
        --windows 64 --out runs/study
    python experiments/study.py ... --rows clusters-0.25,everything-0.06 --distil 80      # likewise, trained
    python experiments/study.py ... --rows dense --plans                               # how well the planner predicts

For every row: bytes of the cache per token (summed from real arrays) as a fraction of the dense bfloat16 one, bytes of
the weights, multiply-adds of scores and mixed values per token, the error of the layers' outputs, perplexity on the
test text and accuracy on the task, with the paired differences from the dense bfloat16 model and their 95 % intervals.
Plans are made, and models trained, on $TEXT and the task's training rows; validation rows and the test text are scored
once a row. Expected: `kv_bytes_per_token` equals its formula in every row.

What is done is kept under --out/rows: a study that was stopped goes on, and tables hold every row that is there.
Writes study.json, .csv, .md, and the pictures study-pareto, study-pareto-distilled and study-spectrum. The last line on
stdout is JSON.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from chai_jax.adapt.distil import distil
from chai_jax.analyse.budget import Budget, plan_within
from chai_jax.analyse.damage import Damage
from chai_jax.analyse.explain import cache_fraction
from chai_jax.analyse.probe import Probe, probe
from chai_jax.compress.calibration import evenly_spaced
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.config import DistilConfig, TrainConfig
from chai_jax.console import console, track
from chai_jax.data.batches import Encoded, Windows, encode
from chai_jax.data.tasks import get_task, held_out, load_rows
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.evaluation.result import Result, TextResult
from chai_jax.evaluation.tasks import evaluate_rows, evaluate_windows
from chai_jax.files.atomic import new_folder, read_jsonl, write_json, write_jsonl
from chai_jax.files.store import load
from chai_jax.model.cache import bytes_per_sequence, bytes_per_token
from chai_jax.model.model import Model
from chai_jax.plans.plan import Plan
from chai_jax.plans.spec import Spec
from lab.damage import score_macs
from lab.options import Record, parse_seeds, start
from lab.study_tables import publish_study
from lab.texts import documents
from lab.variants import CHOICES, Variant, variants

GATE_WINDOWS = 16  # of held-out text, on which predicted and measured costs of a plan are compared
PLANNED = np.geomspace(0.6, 0.05, 10)  # budgets of those plans


@dataclass(frozen=True)
class Study:
    """The options of the study."""

    model: Positional[str]
    """Hub id or folder of a dense OPT."""
    data_dir: Path
    """Folder with TASK/train.jsonl and TASK/validation.jsonl, or .jsonl.gz."""
    train_text: tuple[Path, ...]
    """Text to calibrate and train on: plain, or .jsonl with a field `text`; gzipped or not."""
    test_text: Path
    """Text to measure perplexity on."""
    task: str = "sst2"
    """Task to measure accuracy on."""
    out: Path = Path("runs/study")
    """Folder of the results."""
    rows: str = ""
    """Only the rows whose names begin with one of these, with commas; the dense row is always there."""
    distil: int = 0
    """Updates of distillation for a second line of every row; 0 for none."""
    batch: int = 16
    """Examples of an update: half of them text windows, half task rows."""
    lr: float = 2e-4
    """Peak learning rate of the distillation."""
    alpha: float = 1.0
    """Weight of the teacher's distribution against the text itself."""
    window: int = 256
    """Tokens of a training or calibration window."""
    windows: int | None = None
    """Measure perplexity on this many evenly spread windows of the test text; all of them, if not given."""
    plans: bool = False
    """Also compare what the planner predicts with what it is, over plans of many budgets."""
    limit: int | None = None
    """Measure accuracy on the first N validation rows."""
    calibration: int = 96
    """Windows of text, and as many task rows, for calibration."""
    seeds: str = "0"
    """Of clusterings, splits and shuffles, with commas; rows of those after the first lie under --out/seed-N."""


class Bench:
    """The model, its data in disjoint parts, and what is measured on them, by one seed."""

    def __init__(self, study: Study, seed: int, out: Path):
        self.study, self.seed, self.out, self.model = study, seed, out, load(study.model)
        self.dense = with_storage(self.model, "bfloat16")
        tokenizer, task = self.model.tokenizer, get_task(study.task)
        text = "\n".join(document for path in study.train_text for document in documents(path))
        cut = windows(tokenizer, text, study.window)[:-1]
        cut = [cut[at] for at in np.random.default_rng(seed).permutation(len(cut))]
        if len(cut) <= study.calibration + GATE_WINDOWS:
            raise InputError(f"the text makes {len(cut)} windows; expected more than {study.calibration}: give more")
        kept, rest = held_out(load_rows(task, "train", study.data_dir), study.calibration, seed)

        def encoded(row: Any) -> Encoded:
            example = task.question(row).example
            # Its end, if it is longer.
            return encode(tokenizer, example.context, example.completion, study.window - 1, cut_completion=True)

        self.calibration = [one.tokens for one in (*cut[: study.calibration], *map(encoded, kept))]
        text_windows = cut[study.calibration :]
        self.gate = Windows.stack([one.tokens for one in text_windows[:GATE_WINDOWS]], self.model.config.pad_token_id)
        self.texts, self.rest, self.encoded = text_windows[GATE_WINDOWS:], rest, encoded
        test = windows(tokenizer, read_text_file(study.test_text), self.model.config.max_positions)
        chosen = np.linspace(0, len(test) - 1, min(study.windows or len(test), len(test))).astype(int)
        self.test = [test[at] for at in chosen]
        self.task, self.validation = task, load_rows(task, "validation", study.data_dir, study.limit)

    @cached_property
    def training(self) -> list[Encoded]:
        """As many text windows as task rows, and no more than the updates take.

        Every token of a task row is a target: the answers alone, one token each, would make every second update noise.
        """
        count = min(self.study.distil * self.study.batch // 2, len(self.texts), len(self.rest))
        rows = (dataclasses.replace(self.encoded(row), start=1) for row in self.rest[:count])
        return [*self.texts[:count], *rows]

    @cached_property
    def probe(self) -> Probe:
        return probe(self.model, self.calibration, window=self.study.window)

    @cached_property
    def damage(self) -> Damage:
        """Of changes to the dense model, on held-out text."""
        return Damage(self.model, *evenly_spaced(self.gate, self.gate.mask.size))

    def within(self, budget: float, *, value_merge: str, **choices: Any) -> Plan:
        """The planner's plan; what a set of choices needs is measured once, in a file of its own."""
        wanted = Budget(budget, **choices)
        file = self.out / f"costs-{'-'.join((*wanted.shares, *wanted.storages, value_merge))}.json"
        return plan_within(self.model, self.probe, wanted, value_merge=value_merge, seed=self.seed, file=file)

    def compressed(self, plan: Plan | None) -> Model:
        if plan is None:
            return self.dense
        return quantize(cluster(self.dense, plan, self.probe), plan, self.probe)

    def distilled(self, model: Model) -> Model:
        wanted = self.study
        train = TrainConfig(wanted.lr, wanted.batch, 1, 1, max_steps=wanted.distil, seed=self.seed)
        return distil(model, self.dense, self.training, DistilConfig(train, alpha=wanted.alpha))

    def measure(self, model: Model) -> tuple[TextResult, Result]:
        return evaluate_windows(model, self.test), evaluate_rows(model, self.task, self.validation)


class Rows:
    """What has been measured, a folder a row."""

    def __init__(self, path: Path):
        self.path = path

    def has(self, name: str) -> bool:
        return (self.path / name / "record.json").is_file()

    def record(self, name: str) -> Record:
        return json.loads((self.path / name / "record.json").read_text(encoding="utf-8"))

    def results(self, name: str) -> tuple[TextResult, Result]:
        text, task = (read_jsonl(self.path / name / f"{what}.jsonl") for what in ("text", "task"))
        return TextResult.from_samples(text), Result.from_samples(task)

    def keep(self, name: str, record: Record, plan: Plan | None, results: tuple[TextResult, Result]) -> None:
        with new_folder(self.path / name) as folder:
            for what, result in zip(("text", "task"), results, strict=True):
                write_jsonl(folder / f"{what}.jsonl", result.samples())
            if plan is not None:
                write_json(folder / "plan.json", plan.to_json())
            write_json(folder / "record.json", record)


def output_error(bench: Bench, model: Model) -> float:
    """Mean over layers of the relative squared error of what each adds, given the dense model's states."""
    layers = enumerate(model.spec.layers)
    return float(np.mean([bench.damage.of_output(at, one, model.params["layers"][str(at)]) for at, one in layers]))


def do(bench: Bench, rows: Rows, variant: Variant, updates: int) -> None:
    """Make, measure and keep one row, and its second line where `updates` of distillation are asked for."""
    model, plan, began = None, None, time.monotonic()
    for name, trained in ((variant.name, False), (f"{variant.name}+distil", True)):
        if rows.has(name) or (trained and not (updates and variant.name != "dense")):
            continue
        console.print(name, style="bold")
        if model is None:
            plan = variant.make()
            model = bench.compressed(plan)
        if trained:
            model = bench.distilled(model)
        results = bench.measure(model)
        if variant.name != "dense":
            text, task = rows.results("dense")
            results = results[0].against(text), results[1].against(task)
        record = {"row": name, "family": variant.family, "updates": updates if trained else 0}
        if trained:
            record |= {setting: getattr(bench.study, setting) for setting in ("lr", "alpha", "batch")}
        record |= describe(bench, model, plan, trained) | {"text": results[0].metrics(), "task": results[1].metrics()}
        rows.keep(name, record | {"seconds": round(time.monotonic() - began, 1)}, plan, results)


def describe(bench: Bench, model: Model, plan: Plan | None, trained: bool) -> Record:
    """What a row's model costs, and what its plan promised."""
    config = bench.model.config
    whole = bytes_per_token(Spec.of(config, "bfloat16"))
    return {
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "kv_bytes_per_token_formula": bytes_per_token(model.spec),
        "kv_bytes_per_sequence": bytes_per_sequence(model.spec),
        "kv_fraction": model.kv_bytes_per_token / whole,
        "model_bytes": model.nbytes,
        "score_macs": score_macs(model, config.max_positions),
        "output_error": None if trained else output_error(bench, model),
        "kl_predicted": plan.predicted if plan else None,
        "kl": None if trained else bench.damage.of_model(model)[0],
        "seed": bench.seed,
    }


def planned(bench: Bench) -> list[Record]:
    """What the planner predicts, on calibration text, for plans of many budgets, and what it is on held-out text."""
    file = bench.out / "planner.json"
    found: list[Record] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    done = {(one["choices"], one["budget"]) for one in found}
    wanted = [(name, round(float(budget), 4)) for name in CHOICES for budget in PLANNED]
    for name, budget in track([one for one in wanted if one not in done], "Predicting and measuring plans"):
        plan = bench.within(budget, **CHOICES[name])
        model = bench.compressed(plan)
        kl = bench.damage.of_model(model)[0]
        fraction = cache_fraction(plan, bench.model.config)
        found.append(
            {"choices": name, "budget": budget, "kv_fraction": fraction, "predicted": plan.predicted, "kl": kl}
        )
        write_json(file, found)
    return found


def public(value: Any) -> Any:
    """An option as it is published: of paths the last name, since where they lie is nobody else's."""
    if isinstance(value, tuple):
        return [public(one) for one in value]
    return Path(value).name if isinstance(value, str | Path) else value


def of_seed(bench: Bench) -> list[Record]:
    """Do what is not done yet by one seed; all rows that it has."""
    rows, wanted = Rows(bench.out / "rows"), tuple(name.strip() for name in bench.study.rows.split(",") if name.strip())
    every = list(variants(bench.model, lambda: bench.probe, bench.within, bench.seed))
    for variant in every:
        if not wanted or variant.name == "dense" or variant.name.startswith(wanted):
            do(bench, rows, variant, bench.study.distil)
    names = [f"{variant.name}{trained}" for variant in every for trained in ("", "+distil")]
    return [rows.record(name) for name in names if rows.has(name)]


def run(study: Study) -> Record:
    """Do what is not done yet, and write the tables."""
    first, *others = parse_seeds(study.seeds)
    bench = Bench(study, first, study.out)
    records = of_seed(bench)
    plans = planned(bench) if study.plans else []
    for seed in others:
        of_seed(Bench(study, seed, study.out / f"seed-{seed}"))
    found = sorted(study.out.glob("seed-*/rows/*/record.json"))
    repeated = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    about = {name: public(value) for name, value in dataclasses.asdict(study).items() if name not in ("rows", "out")}
    return publish_study(study.out, records, repeated, plans, bench.model, bench.probe, about)


if __name__ == "__main__":
    start(run, Study, __doc__)
