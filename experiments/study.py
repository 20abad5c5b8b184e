"""What a smaller cache costs: every way to compress it, against its bytes, before and after distillation.

    python experiments/study.py $MODEL --data-dir $DATA --train-text $TEXT --test-text $DATA/wikitext2/test.raw.txt.gz \
        --distil 60 --out runs/study

For every row of the study: bytes of the cache per token (summed from real arrays) as a fraction of the dense bfloat16
one, bytes of the weights, multiply-adds of the scores per token, perplexity on the test text and accuracy on the task
with the paired differences from the dense bfloat16 model and their 95 % intervals. Plans are made, and models trained,
on $TEXT and the task's training rows; validation rows and the test text are scored once. Expected: every row's
`kv_bytes_per_token` equals its formula; the row `latent-1/1` would equal `dense`.

What is done is kept under --out (a folder per row: plan.json, record.json), so that a study that was stopped goes on.
Writes results.json, results.csv and results.md. The last line on stdout is where they are, as JSON.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from chai_jax.adapt.distil import distil
from chai_jax.analyse.budget import Budget, plan_within
from chai_jax.analyse.planner import find_clusters, plan, singletons
from chai_jax.analyse.probe import Probe, probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.config import DistilConfig, TrainConfig
from chai_jax.data.batches import Encoded, encode
from chai_jax.data.tasks import get_task, held_out, load_rows
from chai_jax.data.text import read_text, windows
from chai_jax.environment import versions, where_computed
from chai_jax.files.atomic import write_json, write_text
from chai_jax.files.store import load
from chai_jax.measure.evaluate import evaluate_rows, evaluate_windows
from chai_jax.measure.result import Result, TextResult
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.model import Model
from chai_jax.plans import ClusterPlan, LayerPlan, Plan
from chai_jax.progress import console
from chai_jax.spec import Spec
from lab.texts import documents

Record = dict[str, Any]
BUDGETS = (0.5, 0.45, 0.35, 0.25, 0.15, 0.12, 0.1, 0.06, 0.03)
RATIOS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Study:
    """The options of the study."""

    model: tyro.conf.Positional[str]
    """Hub id or folder of a dense OPT."""
    data_dir: Path
    """Folder holding TASK/{train,validation}.jsonl[.gz]."""
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
    batch: int = 32
    """Examples of an update: text windows and task rows."""
    lr: float = 3e-4
    """Peak learning rate of the distillation."""
    window: int = 256
    """Tokens of a training or calibration window."""
    windows: int | None = None
    """Measure perplexity on this many evenly spread windows of the test text; all of them, if not given."""
    limit: int | None = None
    """Measure accuracy on the first N validation rows."""
    calibration: Annotated[int, tyro.conf.arg(aliases=["-c"])] = 96
    """Windows of text, and as many task rows, for calibration."""
    seed: int = 0
    """Of clusterings, splits and shuffles."""


class Bench:
    """The model, its data in disjoint parts, and what is measured on them."""

    def __init__(self, study: Study):
        self.study, self.model = study, load(study.model)
        self.dense = with_storage(self.model, "bfloat16")
        tokenizer, task = self.model.tokenizer, get_task(study.task)
        text = "\n".join(document for path in study.train_text for document in documents(path))
        cut = windows(tokenizer, text, study.window)[:-1]
        np.random.default_rng(study.seed).shuffle(cut)  # type: ignore[arg-type]
        kept, rest = held_out(load_rows(task, "train", study.data_dir), study.calibration, study.seed)

        def encoded(row: Any) -> Encoded:
            example = task.request(row).example
            return encode(tokenizer, example.context, example.completion, self.model.config.max_positions - 1)

        self.calibration = [one.tokens for one in (*cut[: study.calibration], *map(encoded, kept))]
        self.training = [*cut[study.calibration :], *map(encoded, rest)]
        test = windows(tokenizer, read_text(study.test_text), self.model.config.max_positions)[:-1]
        chosen = np.linspace(0, len(test) - 1, min(study.windows or len(test), len(test))).astype(int)
        self.test = [test[at] for at in chosen]
        self.task, self.validation = task, load_rows(task, "validation", study.data_dir, study.limit)

    @cached_property
    def probe(self) -> Probe:
        return probe(self.model, self.calibration, window=self.study.window)

    def within(self, budget: float, **choices: Any) -> Plan:
        """The planner's plan; every row measures what its choices need once, in a file of its own."""
        shares = choices.get("shares", ("qkv", "kv"))
        merge = choices.pop("value_merge", "low_rank")
        file = self.study.out / f"costs-{'-'.join(shares)}-{'-'.join(choices['storages'])}-{merge}.json"
        wanted = Budget(budget, **choices)
        return plan_within(self.model, self.probe, wanted, value_merge=merge, seed=self.study.seed, file=file)

    def measure(self, model: Model) -> tuple[TextResult, Result]:
        return evaluate_windows(model, self.test), evaluate_rows(model, self.task, self.validation)

    def distilled(self, model: Model) -> Model:
        train = TrainConfig(
            lr=self.study.lr, batch=self.study.batch, accumulation=1, epochs=1, max_steps=self.study.distil
        )
        return distil(model, self.dense, self.training, DistilConfig(dataclasses.replace(train, seed=self.study.seed)))


def stored(layers: list[LayerPlan], storage: str) -> tuple[LayerPlan, ...]:
    """The layers with one cache format."""
    return tuple(
        dataclasses.replace(one, clusters=tuple(dataclasses.replace(c, storage=storage) for c in one.clusters))
        for one in layers
    )


def rows(bench: Bench) -> Iterator[tuple[str, Callable[[], Plan | None]]]:
    """Name and plan of every row, cheapest to make first; no plan is the dense model."""
    config, seed = bench.model.config, bench.study.seed

    def uniform(share: str, clusters: Any, storage: str = "bfloat16", **merges: str) -> Plan:
        found = [LayerPlan(find_clusters(corr, clusters, seed)) for corr in bench.probe.correlation]
        return Plan(stored(found, storage), share, **merges)  # type: ignore[arg-type]

    def latent(part: float, storage: str = "bfloat16") -> Plan:
        rank = max(1, round(part * config.hidden_size))
        one = LayerPlan((ClusterPlan(tuple(range(config.num_heads)), 0),), key_rank=rank, value_rank=rank)
        return Plan(stored([one] * config.num_layers, storage), "kv")

    def dense(storage: str) -> Plan:
        return Plan(stored([LayerPlan(singletons(config.num_heads))] * config.num_layers, storage))

    def random(share: str, ratio: float, draw: int) -> Plan:
        layers = []
        rng = np.random.default_rng((seed, draw))
        count = max(1, round(ratio * config.num_heads))
        for _ in range(config.num_layers):
            parts = np.array_split(rng.permutation(config.num_heads), count)
            heads = [tuple(sorted(part.tolist())) for part in parts]
            layers.append(LayerPlan(tuple(ClusterPlan(part, part[0]) for part in heads)))
        return Plan(tuple(layers), share)

    low_rank = {"score_merge": "low_rank", "value_merge": "low_rank"}
    fit = {"score_merge": "low_rank", "value_merge": "fit"}
    yield "dense", lambda: None
    yield "int8", lambda: dense("int8")
    for ratio in RATIOS:
        yield f"qk-{ratio}", lambda ratio=ratio: uniform("qk", ratio)
        yield f"qk-random-{ratio}", lambda ratio=ratio: random("qk", ratio, 0)
        yield f"qkv-{ratio}", lambda ratio=ratio: uniform("qkv", ratio)
        yield f"qkv-low_rank-{ratio}", lambda ratio=ratio: uniform("qkv", ratio, **low_rank)
        yield f"qkv-fit-{ratio}", lambda ratio=ratio: uniform("qkv", ratio, **fit)
        yield f"latent-{ratio / 2}", lambda ratio=ratio: latent(ratio / 2)
    yield "latent-0.0625", lambda: latent(0.0625)
    yield "elbow", lambda: uniform("qkv", "elbow")
    yield (
        "tiers",
        lambda: plan(bench.model, bench.probe, layers=1.0, seed=seed, score_merge="low_rank", value_merge="fit"),
    )
    for budget in BUDGETS:
        clusters = {"shares": ("qkv",), "storages": ("bfloat16", "int8"), "value_merge": "fit"}
        yield f"clusters-{budget}", lambda budget=budget, clusters=clusters: bench.within(budget, **clusters)
        everything = {"storages": ("bfloat16", "int8", "int4")}
        yield f"everything-{budget}", lambda budget=budget, everything=everything: bench.within(budget, **everything)


def score_macs(model: Model, columns: int) -> int:
    """Multiply-adds of attention scores and mixed values of one token against `columns` cached ones."""
    return columns * sum(
        layer.query_heads * layer.key_rank + layer.output_heads * layer.value_rank for layer in model.spec.layers
    )


def record_of(bench: Bench, name: str, model: Model, made: Plan | None, dense: Any, seconds: float) -> Record:
    text, answers = bench.measure(model)
    if dense is not None:
        text, answers = text.against(dense[0]), answers.against(dense[1])
    config = bench.model.config
    whole = bytes_per_token(Spec.dense(config.num_layers, config.num_heads, config.head_dim, "bfloat16"))
    return {
        "row": name,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "kv_bytes_per_token_formula": bytes_per_token(model.spec),
        "kv_fraction": model.kv_bytes_per_token / whole,
        "model_bytes": model.nbytes,
        "score_macs": score_macs(model, config.max_positions),
        "text": text.metrics(),
        "task": answers.metrics(),
        "predicted_kl": made.predicted if made else None,
        "seconds": round(seconds, 1),
        "seed": bench.study.seed,
    }


def run(study: Study) -> Record:
    """Do what is not done yet, and write the tables."""
    bench = Bench(study)
    wanted = tuple(name.strip() for name in study.rows.split(",") if name.strip())
    records: list[Record] = []
    dense: Any = None
    for name, make in rows(bench):
        if wanted and name != "dense" and not name.startswith(wanted):
            continue
        for updates in [0] if name == "dense" or not study.distil else [0, study.distil]:
            label = f"{name}+distil" if updates else name
            file = study.out / "rows" / label / "record.json"
            if not file.exists() or (name == "dense" and dense is None):
                console.print(f"[bold]{label}[/bold]", highlight=False)
                began, made = time.monotonic(), make()
                model = bench.dense if made is None else quantize(cluster(bench.dense, made, bench.probe), made)
                model = bench.distilled(model) if updates else model
                if name == "dense":
                    dense = bench.measure(model)
                record = record_of(
                    bench, label, model, made, None if name == "dense" else dense, time.monotonic() - began
                )
                if made is not None:
                    write_json(file.parent / "plan.json", made.to_json())
                write_json(file, record)
            records.append(json.loads(file.read_text(encoding="utf-8")))
            write_tables(study, records)
    return {"out": str(study.out), "rows": len(records)}


def table(records: list[Record]) -> list[Record]:
    """Flat rows for CSV and Markdown."""

    def flat(record: Record) -> Record:
        text, task = record["text"], record["task"]
        low, high = task.get("difference_interval", (None, None))
        return {
            "row": record["row"],
            "cache %": round(100 * record["kv_fraction"], 1),
            "bytes/token": record["kv_bytes_per_token"],
            "weights MB": round(record["model_bytes"] / 1e6, 2),
            "score MACs": record["score_macs"],
            "perplexity": round(text["perplexity"], 2),
            "ppl change %": _percent(text.get("difference")),
            "acc %": round(100 * task["acc"], 1),
            "s.e.": round(100 * task["acc_stderr"], 1),
            "difference": None if low is None else round(100 * task["difference"], 1),
            "95 % low": None if low is None else round(100 * low, 1),
            "95 % high": None if high is None else round(100 * high, 1),
            "flips": sum(task["flips"].values()) if isinstance(task.get("flips"), dict) else task.get("flips"),
        }

    return [flat(record) for record in records]


def _percent(difference: float | None) -> float | None:
    """A difference of losses in nats as a change of perplexity in per cent."""
    return None if difference is None else round(100 * float(np.expm1(difference)), 2)


def write_tables(study: Study, records: list[Record]) -> None:
    """results.json (with all metrics), results.csv and results.md."""
    flat = table(records)
    names = list(flat[0])
    lines = [[("" if row[name] is None else str(row[name])) for name in names] for row in flat]
    about = {"model": Path(study.model).name, "task": study.task, **where_computed(), "versions": versions()}
    write_json(study.out / "results.json", {**about, "rows": records})
    write_text(study.out / "results.csv", "".join(",".join(cells) + "\n" for cells in [names, *lines]))
    first = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    write_text(study.out / "results.md", "\n".join(first + [f"| {' | '.join(cells)} |" for cells in lines]) + "\n")


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Study, description=__doc__))))
