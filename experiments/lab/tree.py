"""The tree of stages: every model that some table needs is made once, measured once, and kept.

Tables, orders and configurations share prefixes: distil, quantize and distil, quantize, target begin with the same
models. A node of the tree is the sequence of stages that led to it, and its folder is

    OUT/tree/MODEL/TASK/seed-SEED/dense[/PLAN/STAGE/STAGE...]

with `model/`, `made.json` (bytes, seconds, where), `log.jsonl` (of its training), and, once somebody asks,
`validation.jsonl` and `held_out.jsonl` (its answers). PLAN is a name for the options of the planner. What is there is
read back, so an experiment that was stopped goes on, and one whose numbers another has made computes nothing.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from chai_jax.bench.race import latency
from chai_jax.compress.quantize import with_storage
from chai_jax.config import Checkpoints, PlanConfig
from chai_jax.console import console
from chai_jax.errors import InputError
from chai_jax.evaluation.result import Result
from chai_jax.files.atomic import check_writable, new_folder, read_jsonl, write_json, write_jsonl
from chai_jax.files.store import load, save
from chai_jax.model.model import Model
from chai_jax.plans.plan import Plan
from chai_jax.run.options import plan_for
from chai_jax.run.stages import Stages
from chai_jax.run.work import Measured, Work, open_work
from lab.options import Options, Record

# From a model, with the branch it lies on and what training is to be given, to the next.
Step = Callable[["Branch", Model, Record], Model]


def target_by(policy: str) -> Step:
    """CHAI-Target with one of its two policies."""

    def step(branch: "Branch", model: Model, keeping: Record) -> Model:
        stages = branch.tree.stages
        chosen = replace(stages, config=replace(stages.config, policy=policy))
        return chosen.target(model, branch.plan, **keeping)

    return step


STEPS: dict[str, Step] = {
    "cluster": lambda branch, model, keeping: branch.tree.stages.cluster(model, branch.plan),
    "distil": lambda branch, model, keeping: branch.tree.stages.distil(model, branch.model(), **keeping),
    "quantize": lambda branch, model, keeping: branch.tree.stages.quantize(model, branch.plan),
    "target": target_by("sensitive"),
    "target-medium-low": target_by("medium-low"),
    "int8": lambda branch, model, keeping: with_storage(model, "int8"),
}
TRAINED = ("distil", "target")  # the first word of a stage that trains


class Tree:
    """One model on one task with one seed: its data, its dense model, and the branches that plans lead to.

    Attributes:
        steps: what each stage does, by name; an experiment may add its own.
    """

    def __init__(self, options: Options, model: str, task: str, seed: int):
        self.options, self.source, self.name, self.task, self.seed = options, model, Path(model).name, task, seed
        self.config = options.run_config(model, task, seed)
        self.path = options.out / "tree" / self.name / task / f"seed-{seed}"
        self.steps = STEPS.copy()
        check_settings(options)

    @cached_property
    def work(self) -> Work:
        return open_work(self.config, load(self.source))

    @cached_property
    def stages(self) -> Stages:
        return Stages(self.config, self.work)

    @cached_property
    def base(self) -> "Branch":
        """The branch of the options' own plan."""
        return self.branch("base", self.config.planning)

    def branch(self, name: str, planning: PlanConfig) -> "Branch":
        return Branch(self, name, planning)


def check_settings(options: Options) -> None:
    """One tree holds the results of one choice of settings.

    Raises:
        InputError: --out holds those of another.
    """
    fields = ("data_dir", "limit", "finetune", "storage", "planning", "train")
    settings = {name: value for name, value in asdict(options).items() if name in fields}
    settings["data_dir"] = str(options.data_dir)
    path = options.out / "tree" / "settings.json"
    if not path.exists():
        check_writable(options.out)
        write_json(path, settings)
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
            raise InputError(
                f"{options.out} holds experiments with {name} = {before.get(name)!r}, not {value!r}; repeat their "
                "command to go on with them, or choose another --out"
            )


class Branch:
    """The nodes of a tree that follow one plan. Of every method the arguments are stages; none: the dense model."""

    def __init__(self, tree: Tree, name: str, planning: PlanConfig):
        self.tree, self.name, self.planning = tree, name, planning

    def path(self, *stages: str) -> Path:
        dense = self.tree.path / "dense"
        return dense.joinpath(self.name, *stages) if stages else dense

    @cached_property
    def plan(self) -> Plan:
        """Made from the dense model, or read back."""
        path = self.path() / self.name / "plan.json"
        if not path.exists():
            costs = path.with_name("costs.json")
            made = plan_for(self.model(), self.tree.work, self.planning, self.tree.seed, costs)
            write_json(path, made.to_json())
        return Plan.read(path)

    def model(self, *stages: str) -> Model:
        """The model at a node, as it was saved; made first, with all before it, if it is not there."""
        path = self.path(*stages)
        if not (path / "made.json").exists():
            self._make(stages, path)
        return load(str(path / "model"))

    def _make(self, stages: Sequence[str], path: Path) -> None:
        before = self.model(*stages[:-1]) if stages else with_storage(load(self.tree.source), self.tree.config.storage)
        label = "+".join(stages) or "dense"
        console.print(f"{self.tree.name} {self.tree.task} seed {self.tree.seed}: {label}", style="bold")
        log: list[Record] = []
        partial = path.with_name(f"{path.name}.partial")
        minutes = self.tree.options.checkpoint_minutes
        keeping: Record = {"log": log.append}
        if minutes is not None:
            keeping["checkpoints"] = Checkpoints(partial, minutes=minutes)
        began = time.monotonic()
        if stages:
            trains = stages[-1].startswith(TRAINED)
            model = self.tree.steps[stages[-1]](self, before, keeping if trains else {})
        else:
            model = self.tree.stages.dense(before, **keeping)
        seconds = time.monotonic() - began
        made = self.tree.stages.record(label, model, {}, seconds) | {"model": self.tree.name, "updates": len(log)}
        with new_folder(path) as folder:
            save(model, folder / "model")
            write_jsonl(folder / "log.jsonl", log)
            write_json(folder / "made.json", made)
        shutil.rmtree(partial, ignore_errors=True)

    def made(self, *stages: str) -> Record:
        """Bytes, seconds and machine of a node: what is known without measuring its accuracy."""
        path = self.path(*stages) / "made.json"
        if not path.exists():
            self.model(*stages)
        return json.loads(path.read_text(encoding="utf-8"))

    def log(self, *stages: str) -> list[Record]:
        """The records of a node's training, one an update."""
        self.made(*stages)
        return read_jsonl(self.path(*stages) / "log.jsonl")

    def measured(self, *stages: str) -> Result:
        """Answers to the validation questions: for what is reported."""
        self.made(*stages)
        return self._answers("validation", stages, lambda: self.tree.work.measure)

    def judged(self, *stages: str) -> Result:
        """Answers to held-out training questions: for choices."""
        self.made(*stages)
        return self._answers("held_out", stages, lambda: self.tree.work.judge)

    def _answers(self, name: str, stages: Sequence[str], measure: Callable[[], Callable[[Model], Measured]]) -> Result:
        """A node's answers, kept in its folder by an earlier call or measured now."""
        path = self.path(*stages) / f"{name}.jsonl"
        if not path.exists():
            write_jsonl(path, measure()(self.model(*stages)).samples())
        return Result.from_samples(read_jsonl(path))

    def latency(self, name: str, nodes: Sequence[tuple[str, ...]]) -> dict[str, Record]:
        """Nodes timed side by side in one run, the first the one that the rest are ratios to; kept under `name`."""
        labels = ["+".join(stages) or "dense" for stages in nodes]
        path = self.path() / self.name / f"latency-{name}.json"
        if path.exists():
            timed = json.loads(path.read_text(encoding="utf-8"))
            if list(timed) == labels:
                return timed
        timed = latency({label: self.model(*stages) for label, stages in zip(labels, nodes, strict=True)})
        write_json(path, timed)
        return timed


def forest(options: Options) -> Iterator[list[Tree]]:
    """For every model and task the trees of all seeds."""
    for model in options.model:
        for task in options.tasks:
            yield [Tree(options, model, task, seed) for seed in options.seed_numbers]
