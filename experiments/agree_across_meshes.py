"""Does a job give the same on every mesh? One device against data parallel, data x model, FSDP, and two processes.

    python experiments/agree_across_meshes.py [sgd] [gradient] [adamw] [looking]

Runs on virtual CPU devices, without network or weights, in a few minutes. A random float32 model is clustered to three
heads, which no axis divides, and distilled from the dense one for 20 updates, the last of each epoch a short one: by
SGD, and by AdamW. Reported per layout are the largest differences to one device: of losses (nats), of gradient norms,
of a gradient, of parameters after 20 updates of either optimizer, of the log-likelihoods (nats) that `evaluate` sums,
and of the probe's correlations; and how many of the predictions and of the generated tokens are others. Expected: all
but AdamW's within 1e-5 and no other prediction or token. AdamW divides by the gradient's own size, so a parameter whose
gradient is nothing but rounding error moves by the learning rate in any direction.

Exits with 1 where two layouts disagree, with 2 where a process fails. The last line on stdout is the record as JSON.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import tyro
from tyro.conf import Positional

TOLERANCE = 1e-5
UPDATES = 20
EXACT = ("predictions", "tokens")
LAYOUTS = {"1": (1, 1, False), "8 data": (8, 1, False), "4 data x 2 model": (4, 2, False), "8 FSDP": (8, 1, True)}
PROCESSES = "2 processes x 4 data"

Record = dict[str, Any]
Arrays = dict[str, np.ndarray]


def models(how: Any) -> tuple[Any, Any]:
    """A dense model of one layer and four heads, and one of three clusters: an odd number, that no axis divides.

    Args:
        how: the `Execution` that they are run by.
    """
    import jax

    from chai_jax.compress.cluster import cluster
    from chai_jax.data.toy import POSITIONS, toy_tokenizer
    from chai_jax.model.model import Model
    from chai_jax.model.params import init
    from chai_jax.plans.architecture import Architecture
    from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
    from chai_jax.plans.spec import Spec

    tokenizer = toy_tokenizer()
    config = Architecture(-(-len(tokenizer) // 8) * 8, 32, 1, 4, 64, POSITIONS, 32)
    spec = Spec.dense(1, 4, 8)
    dense = Model(config, spec, init(config, spec, jax.random.key(0), std=0.1), tokenizer, "random", execution=how)
    clusters = tuple(ClusterPlan(heads, heads[0], storage="float32") for heads in ((0,), (1, 3), (2,)))
    return dense, cluster(dense, Plan((LayerPlan(clusters),)))


@dataclass(frozen=True)
class Job:
    """What is computed on every layout."""

    layout: Any
    dense: Any
    student: Any
    examples: list[Any]

    def tuned(self, rate: float) -> tuple[Any, list[Record]]:
        """The student after 20 updates, and the log."""
        from chai_jax.adapt.distil import distil
        from chai_jax.config import DistilConfig, TrainConfig

        log: list[Record] = []
        settings = TrainConfig(lr=rate, batch=12, accumulation=2, epochs=3, max_steps=UPDATES)
        return distil(self.student, self.dense, self.examples, DistilConfig(settings), log.append), log

    def sgd(self) -> Arrays:
        """Training by SGD, and the evaluation of what comes out."""
        import optax

        from chai_jax.adapt import train
        from chai_jax.data.tasks import TASKS, load_rows
        from chai_jax.evaluation.tasks import evaluate_rows

        with mock.patch.object(train, "optimizer", lambda config, *_: optax.sgd(config.lr)):
            model, log = self.tuned(0.1)
        result = evaluate_rows(model, TASKS["toy"], load_rows(TASKS["toy"], "validation", limit=50))
        return {
            "loss": np.array([entry["loss"] for entry in log]),
            "grad_norm": np.array([entry["grad_norm"] for entry in log]),
            "sgd_parameters": flat(model.params),
            "loglikelihoods": result.loglikelihoods,
            "predictions": result.predictions,
        }

    def gradient(self) -> Arrays:
        """Of the first twelve examples."""
        import jax

        from chai_jax.adapt.distil import distillation_loss
        from chai_jax.adapt.finetune import training_execution
        from chai_jax.adapt.step import gradients
        from chai_jax.adapt.updates import microbatches, pack_update
        from chai_jax.config import TrainConfig

        shape = microbatches(TrainConfig(batch=12, accumulation=2), self.layout.ways)
        packed = pack_update(
            self.examples[:12], shape, self.student.config.max_positions, 8, self.layout.share(shape[1])
        )
        pair = (self.dense, self.student)
        teacher, masters = (self.layout.params(model.config, model.spec, model.params) for model in pair)
        configs, specs = tuple(model.config for model in pair), tuple(model.spec for model in pair)
        loss = partial(distillation_loss, configs, specs, training_execution(self.student, TrainConfig()), 2.0, 0.5)
        nothing, batch = jax.tree.map(lambda _: None, masters), self.layout.join(packed, shape[1])
        return {"gradient": flat(jax.jit(partial(gradients, loss))(masters, nothing, teacher, batch)[0])}

    def adamw(self) -> Arrays:
        """Training by AdamW."""
        return {"adamw_parameters": flat(self.tuned(1e-3)[0].params)}

    def looking(self) -> Arrays:
        """Probing and generating."""
        from chai_jax.analyse.probe import probe
        from chai_jax.serve.generate import generate_tokens

        prompts = [[2, *range(4, 4 + length)] for length in (1, 5, 9)]
        return {
            "probe": probe(self.dense, [list(range(2, 20 + at)) for at in range(5)]).correlation,
            "tokens": np.array(generate_tokens(self.student, prompts, max_new_tokens=8, stop=False)),
        }


MEASURES = {"sgd": Job.sgd, "gradient": Job.gradient, "adamw": Job.adamw, "looking": Job.looking}


def flat(tree: Any) -> np.ndarray:
    """All numbers of a tree."""
    import jax

    from chai_jax.model.sharding import whole

    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(whole(tree))])


def work(folder: Path, process: int | None, port: str, measures: list[str]) -> None:
    """One process's part: all layouts on its eight devices, or the one that it shares with another process."""
    import jax

    from chai_jax.data.batches import Encoded
    from chai_jax.model.execution import Execution
    from chai_jax.model.sharding import Layout, make_mesh

    if process is None:
        layouts = {name: Layout(make_mesh(data, model), fsdp) for name, (data, model, fsdp) in LAYOUTS.items()}
    else:
        jax.distributed.initialize(f"localhost:{port}", 2, process)
        layouts = {PROCESSES: Layout(make_mesh())}
    random = np.random.default_rng(0)
    lengths = zip(random.integers(4, 17, 100).tolist(), random.integers(1, 4, 100).tolist(), strict=True)
    examples = [Encoded(tuple(random.integers(4, 40, size).tolist()), size - answer) for size, answer in lengths]
    for name, layout in layouts.items():
        job = Job(layout, *models(Execution.choose(layout=layout)), examples)
        found = [MEASURES[measure](job) for measure in measures]
        label = name if process is None else f"{name}, seen by process {process}"
        np.savez(folder / f"{label}.npz", **{key: value for each in found for key, value in each.items()})


def spreads(found: Arrays, expected: Arrays) -> Record:
    """The largest difference of each quantity, or how many entries differ where they must be the same."""
    return {
        name: int((found[name] != each).sum()) if name in EXACT else float(np.abs(found[name] - each).max())
        for name, each in expected.items()
    }


def main(measures: Positional[tuple[Literal["sgd", "gradient", "adamw", "looking"], ...]] = tuple(MEASURES)) -> int:
    """Run the three processes, two of them together, and compare.

    Args:
        measures: of sgd, gradient, adamw and looking, those to compare; all, if not given.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as name:
        running = []
        for process, devices in ((None, 8), (0, 4), (1, 4)):
            command = [sys.executable, __file__, "--worker", name, "" if process is None else str(process), port]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
            running.append(subprocess.Popen([*command, *measures], env=environment))
        statuses = [process.wait() for process in running]
        if any(statuses):
            return 2
        found = {path.stem: dict(np.load(path)) for path in sorted(Path(name).iterdir())}
    expected = found.pop("1")
    record = {name: spreads(each, expected) for name, each in found.items()}
    quantities = list(expected)
    print(f"{'':<42}" + "".join(f"{quantity:>18}" for quantity in quantities))
    for name, row in record.items():
        print(f"{name:<42}" + "".join(f"{row[quantity]:>18.3g}" for quantity in quantities))
    agree = all(
        row[quantity] <= (0 if quantity in EXACT else TOLERANCE)
        for row in record.values()
        for quantity in quantities
        if quantity != "adamw_parameters"
    )
    print(json.dumps({"agree": agree, "updates": UPDATES, "tolerance": TOLERANCE, "spreads": record}))
    return 0 if agree else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), int(sys.argv[3]) if sys.argv[3] else None, sys.argv[4], sys.argv[5:])
    else:
        sys.exit(tyro.cli(main, description=__doc__))
