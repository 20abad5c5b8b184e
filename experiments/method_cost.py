"""What the method itself costs: time and memory to probe, cluster, plan, convert and save a model of some size.

    python experiments/method_cost.py facebook/opt-1.3b --seeds 0 --out runs/method_cost

MODEL is a published shape here, or a folder with a config.json: the costs do not depend on the weights, so random ones
are written, by another process, to --out/SHAPE in Hugging Face layout and float16, as those on the hub, and read back.
Calibrated on --windows random windows of --window tokens. Every layer is clustered to half of its heads (`qkv`, values
fitted by default), then stored by tier. Of each step: seconds, what the process holds after it (resident) and the most
it ever held. Expected: no second copy of the model.

Writes method_cost.json, .csv and .md.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chai_jax.analyse.planner import plan
from chai_jax.analyse.probe import probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.console import console
from chai_jax.files.published import random_model
from chai_jax.files.store import load, save
from chai_jax.model.model import Model
from chai_jax.report.tables import Column
from lab.memory import gib, peak, resident
from lab.options import Common, Record, start
from lab.publish import publish

COLUMNS: tuple[Column, ...] = (
    ("shape", lambda row: row["shape"]),
    ("step", lambda row: row["step"]),
    ("seconds", lambda row: f"{row['seconds']:.1f}"),
    ("resident after it, GiB", lambda row: gib(row["resident_bytes"])),
    ("most so far, GiB", lambda row: gib(row["peak_bytes"])),
    ("model as stored, GiB", lambda row: gib(row["model_bytes"])),
)


@dataclass(frozen=True)
class CostOptions(Common):
    write: bool = False
    """Only write the random weights."""
    windows: int = 64
    """Calibration windows."""
    window: int = 64
    """Tokens of each."""
    clusters: float = 0.5
    """Part of the heads that is kept."""
    value_merge: str = "fit"
    """`representative`, `low_rank` or `fit`."""


def write(shape: str, folder: Path, seed: int) -> None:
    """Random float16 weights of a shape."""
    model = random_model(shape, seed)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model.params)
    save(model.replace(params=halves), folder)


def costs(options: CostOptions, shape: str, folder: Path) -> Iterator[Record]:
    """A row for every step."""

    def step(name: str, act: Callable[[], Any], model: Model | None = None) -> tuple[Any, Record]:
        console.print(f"{shape}: {name}")
        began = time.perf_counter()
        made = act()
        jax.block_until_ready(made.params if isinstance(made, Model) else None)
        seconds, size = time.perf_counter() - began, (model or made).nbytes
        held = {"resident_bytes": resident(), "peak_bytes": peak(), "model_bytes": size}
        return made, {"shape": shape, "step": name, "seconds": seconds, **held}

    model, row = step("read", lambda: load(folder))
    yield row
    random = np.random.default_rng(options.seed_numbers[0])
    texts = random.integers(4, model.config.vocab_size, (options.windows, options.window)).tolist()
    looked, row = step("probe", lambda: probe(model, texts), model)
    yield row
    merges = {"score_merge": "representative" if options.value_merge == "representative" else "low_rank"}
    merges |= {"value_merge": options.value_merge}
    planned = partial(plan, model, looked, layers=1.0, clusters=options.clusters, **merges)
    wanted, row = step("cluster and plan", planned, model)
    yield row
    small, row = step("convert", lambda: cluster(model, wanted, looked))
    yield row
    small, row = step("store by tier", lambda: quantize(small, wanted))
    yield row
    yield step("save", lambda: save(small, folder.with_name(f"{folder.name}-compressed")), small)[1]


def method_cost(options: CostOptions) -> Record:
    """All shapes; the peak is the process's, so give one shape a command."""
    rows, findings = [], []
    for shape in options.model:
        folder = options.out / Path(shape).name
        if options.write:
            write(shape, folder, options.seed_numbers[0])
            return {"written": str(folder)}
        if not folder.exists():
            subprocess.run([sys.executable, *sys.argv, "--write"], check=True, stdout=subprocess.DEVNULL)
        mine = list(costs(options, shape, folder))
        most = max(row["peak_bytes"] for row in mine)
        findings.append(
            f"{shape}: {sum(row['seconds'] for row in mine):.0f} s in all, at most {gib(most)} GiB in memory, for "
            f"a model of {gib(mine[0]['model_bytes'])} GiB."
        )
        rows += mine
    return publish(options, "method_cost", "What the method costs", rows, COLUMNS, findings=findings)


if __name__ == "__main__":
    start(method_cost, CostOptions, __doc__)
