"""What CHAI buys a well-trained model: heads that share attention, keys or values, against the bytes they save.

    python experiments/sharing.py $MODEL --text wiki.test.raw --calibration corpus.txt --seeds 0 --out runs/sharing
    python experiments/few_bits_distil.py $MODEL --compressed runs/sharing/NAME-ROW ... --out runs/trained   # trained
    python experiments/few_bits_tasks.py $MODEL --compressed runs/sharing/NAME-ROW runs/trained/... ...      # asked

Every layer (or the half of them whose heads are most alike) is merged to 3/4, 1/2 and 1/4 of its key heads, rounded:

- `qk`: heads of a cluster share one attention, that of its medoid; all values stay. This is CHAI as published, with
  clusters found on calibration text. `random` has random clusters of the same number.
- `qkv`: they share one value too, the medoid's or the best of its rank (`low_rank`).
- `kv`: all keys and values of a layer become latents of that part of their dimensions; every head attends by itself.
- `queries`: of the queries of each key head fewer stay (models with grouped queries only); it saves work, not bytes.

Damage is measured as in `few_bits.py`, without training, all in bfloat16. Each model is saved as OUT/NAME-ROW for the
other two commands. Expected of a well-trained model: `qk` costs far more than any cache of few bits that is smaller,
and its clusters hardly less than random ones. Writes sharing.json, .csv and .md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from chai_jax.analyse.planner import find_clusters, plan, singletons
from chai_jax.analyse.probe import Probe
from chai_jax.analyse.queries import query_clusters
from chai_jax.compress.cluster import cluster
from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.files.store import load, save
from chai_jax.model.model import Model
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from lab.damage import COLUMNS, ROWS, WEIGHTS, damage, figures, layer_by_layer, sizes, whole_windows
from lab.options import Common, Record, start
from lab.publish import publish
from lab.texts import calibrated
from lab.variants import LOW_RANK, RATIOS, at_random, stored_as


@dataclass(frozen=True)
class SharingOptions(Common):
    text: Path | None = None
    """What damage is measured on: a text file, plain or .gz."""
    calibration: Path | None = None
    """What heads are compared on: another one."""
    windows: int = 64
    window: int = 512
    """Tokens of a window."""
    rows: str = ""
    """Only the rows whose names begin with one of these, with commas."""


def counts(heads: int) -> list[int]:
    """How many of them stay."""
    return sorted({max(1, round(ratio * heads)) for ratio in RATIOS} - {heads}, reverse=True)


def plans(config: Architecture, model: Model, seen: Probe, seed: int) -> Iterator[tuple[str, Plan]]:
    """Every row's name and plan."""
    heads, layers, random = config.kv_heads, config.num_layers, np.random.default_rng(seed)
    for count in counts(heads):
        found = tuple(LayerPlan(find_clusters(each, count, seed)) for each in seen.correlation)
        yield f"qk-{count}", Plan(found, "qk")
        half = plan(model, seen, share="qk", layers=0.5, clusters=count, sensitivity="attention", seed=seed)
        yield f"qk-{count}-half", Plan(tuple(stored_as(each, "bfloat16") for each in half.layers), "qk")
        drawn = tuple(LayerPlan(at_random(heads, count, random)) for _ in range(layers))
        yield f"qk-{count}-random", Plan(drawn, "qk")
        yield f"qkv-{count}", Plan(found, "qkv")
        yield f"qkv-{count}-low_rank", Plan(found, "qkv", **LOW_RANK)
    everyone = ClusterPlan(tuple(range(heads)), 0)
    for ratio in RATIOS if heads > 1 else ():
        rank = round(ratio * config.kv_width)
        latent = LayerPlan((everyone,), key_rank=config.even(rank), value_rank=rank)
        yield f"kv-{ratio:g}", Plan((latent,) * layers, "kv")
    for count in counts(config.queries):
        kept = query_clusters(seen, count, seed)
        yield f"queries-{count}", Plan(tuple(LayerPlan(singletons(heads), query_clusters=each) for each in kept), "qk")


def sharing(options: SharingOptions) -> Record:
    """All models, one after the other."""
    if options.text is None or options.calibration is None or options.windows < 2:
        raise InputError("expected --text FILE, --calibration FILE and at least two --windows")
    wanted, rows = tuple(filter(None, options.rows.split(","))), []
    for source in options.model:
        dense, name = load(source, storage="bfloat16"), Path(source).name
        tokens = whole_windows(dense.tokenizer, options.text, options.window, options.windows)
        seen = calibrated(dense, options.calibration)
        made: dict[str, Model] = {}
        for row, how in plans(dense.config, dense, seen, options.seed_numbers[0]):
            if not wanted or row.startswith(wanted):
                made[row] = cluster(dense, how, seen)
        if not made:
            raise InputError(f"{name} has no rows {options.rows!r}; expected beginnings of qk-2, kv-0.5, ... of --help")
        for row, model in track(list(made.items()), "Saving"):
            if not (options.out / f"{name}-{row}").exists():
                save(model, options.out / f"{name}-{row}")
        read = partial(damage, layer_by_layer(dense), [layer_by_layer(model) for model in made.values()])
        for (row, model), (kl, rise) in zip(made.items(), read(tokens, ROWS), strict=True):
            about = {"model": name, "cache": row} | sizes(model, dense, options.window)
            rows.append(about | {"weights": model.nbytes / dense.nbytes} | figures(kl, rise))
    return publish(options, "sharing", "What sharing between heads costs", rows, (*COLUMNS, WEIGHTS))


if __name__ == "__main__":
    start(sharing, SharingOptions, __doc__)
