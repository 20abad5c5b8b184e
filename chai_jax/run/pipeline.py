"""A run: the dense model, its clustering, the stages in the order asked for; evaluated, recorded, resumable."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chai_jax.adapt.distil import check_vocabulary
from chai_jax.adapt.target import select_layers
from chai_jax.analyse.gate import Gate, measured_kl
from chai_jax.bench.race import latency
from chai_jax.compress.quantize import with_storage
from chai_jax.config import STAGES, RunConfig, TargetConfig
from chai_jax.console import console, print_table
from chai_jax.data.multiple_choice import TASK_SHA256, Task
from chai_jax.errors import InputError, Stopped
from chai_jax.files.atomic import finite, new_folder, write_json, write_text
from chai_jax.files.store import load
from chai_jax.inputs.reading import Record
from chai_jax.machine.processes import agreed, anywhere, first_process, once
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.plans.plan import Plan
from chai_jax.report.page import write_page
from chai_jax.report.saved import read_records
from chai_jax.report.tables import as_csv, markdown, terminal
from chai_jax.run.folder import RunFolder
from chai_jax.run.logs import harmless, tensorboard, together, wandb
from chai_jax.run.options import check_options, plan_for
from chai_jax.run.stages import Stages
from chai_jax.run.work import Work, open_work, task_of
from chai_jax.sources import open_model, source_of
from chai_jax.stopping import terminated


@dataclass(frozen=True)
class Stage:
    """A named step from one model to the next; its folder is `stages/INDEX-NAME`."""

    name: str
    apply: Callable[[Model], Model]


def run(config: RunConfig, execution: Execution | None = None) -> Record:
    """The main job; writes the run folder and returns its summary.

    Args:
        execution: how its models are run; as suits the devices here, if not given.

    Raises:
        InputError: anything that cannot be used, found out before the work starts where that is possible.
    """
    began = time.monotonic()
    config.check()
    order = parse_order(config.order)
    plan = Plan.read(config.plan) if config.plan else None
    usual = source_of(config.model)
    config = dataclasses.replace(config, planning=config.planning.filled(usual.planning))
    task = task_of(config)
    folder = RunFolder(config.folder, recorded_settings(config, task))
    source = open_model(config.model, config.revision, config.seed, execution)
    if not source.spec.is_dense:
        raise InputError(
            f"{config.model} is clustered already; expected a dense model: start from the one it was made from"
        )
    teacher = None if config.teacher is None else load(config.teacher, execution=execution)
    check_request(config, source, plan, teacher)
    work = open_work(config, source)
    if not work.training and {"distil", "target"} & set(order):
        raise InputError(f"{work.name} leaves nothing to train on beside what is held out; expected more of it")
    pipeline = Pipeline(config, folder, work, source, teacher, began)
    with folder.open():
        for index, stage in enumerate(pipeline.stages(order, plan)):
            pipeline.do(index, stage)
        return pipeline.report()


def check_request(config: RunConfig, source: Model, plan: Plan | None, teacher: Model | None) -> None:
    """Refuse, before the work starts, what a later stage would refuse."""
    if plan is not None:
        plan.check_model(source.config)
        if "target" in parse_order(config.order):
            select_layers(plan, TargetConfig(policy=config.policy))
    else:
        check_options(config.planning, source.config)
    if teacher is not None:
        check_vocabulary(source, teacher)


def parse_order(order: str) -> tuple[str, ...]:
    """The stages of `--order`.

    Raises:
        InputError: an unknown stage, or one that is named twice.
    """
    names = tuple(name.strip() for name in order.split(",") if name.strip())
    for name in names:
        if name not in STAGES:
            raise InputError(f"--order has the unknown stage {name!r}; expected some of {', '.join(STAGES)}")
        if names.count(name) > 1:
            raise InputError(f"--order has the stage {name!r} twice; expected each at most once")
    return names


def recorded_settings(config: RunConfig, task: Task | None = None) -> Record:
    """The settings that decide the result, as JSON; paths as given, and of a task file its SHA-256 too."""
    fields = dataclasses.asdict(config)
    for name in ("out", "operation", "devices"):
        del fields[name]
    about = {} if task is None or task.origin is None else {TASK_SHA256: task.origin.sha256}
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()} | about


class Pipeline:
    """One run under way: the current model and what has been recorded of the stages before it."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, work: Work, source: Model, teacher: Model | None, began: float
    ):
        self.config, self.folder, self.work, self.teacher = config, folder, work, teacher
        self.steps = Stages(config, work)
        self.dense = with_storage(source, config.storage)
        self.model = self.dense
        self.done: list[str] = []
        minutes = config.operation.max_minutes
        self.deadline = None if minutes is None else began + 60 * minutes

    def stages(self, order: tuple[str, ...], plan: Plan | None) -> list[Stage]:
        """Dense first, then clustering, then the stages asked for."""
        later = {
            "distil": self._distil,
            "quantize": lambda model: self.steps.quantize(model, self._plan()),
            "target": self._target,
        }
        if plan is not None:
            self._take_plan(plan)
        return [
            Stage("dense", self._dense),
            Stage("cluster", self._cluster),
            *(Stage(name, later[name]) for name in order),
        ]

    def do(self, index: int, stage: Stage) -> None:
        """Run a stage and record it, or take up what an earlier, interrupted run recorded."""
        if not self.folder.finished(index, stage.name):
            self._stop_if_asked(stage.name)
            console.print(stage.name, style="bold")
            began = time.monotonic()
            model = stage.apply(self.model)
            spent = time.monotonic() - began
            gate = self._gate(stage.name, model)
            measured: Any = self.work.measure(model)
            if index:
                measured = measured.against(self.work.recall(self.folder.predictions(0, "dense")))
            record = self.steps.record(stage.name, model, measured.metrics(), spent) | gate
            self.folder.finish(index, stage.name, model, record, measured.samples())
        self.folder.clear_partial(index, stage.name)
        # What goes on is what was saved, so that a resumed run and an undisturbed one compute with the same model.
        self.model = self._load(index, stage.name)
        if index == 0:
            self.dense = self.model
        self.done.append(stage.name)

    def _load(self, index: int, stage: str) -> Model:
        """The model that a stage has saved, run as the source is."""
        return load(str(self.folder.stage_path(index, stage) / "model"), execution=self.model.execution)

    def _stop_if_asked(self, what: str) -> None:
        late, signalled = anywhere([self.deadline is not None and time.monotonic() >= self.deadline, terminated()])
        if late or signalled:
            why = "SIGTERM" if signalled else "the time is up"
            console.print(f"stopped before {what} ({why}): the same command goes on from there")
            raise Stopped

    def _keeping(self, stage: str) -> Record:
        """The log and the checkpoints of the next stage's training."""
        wanted, out = self.config.operation, self.folder.path
        logs = [self.folder.logger(stage)]
        if wanted.tensorboard and first_process():
            logs.append(harmless("TensorBoard", tensorboard(out / "tensorboard", stage)))
        if wanted.wandb is not None and first_process():
            logs.append(harmless("Weights & Biases", wandb(wanted.wandb, out, self.folder.config, stage)))
        path = self.folder.checkpoints(len(self.done), stage)
        return {"log": together(logs), "checkpoints": wanted.at(path, self.deadline)}

    def _dense(self, model: Model) -> Model:
        return self.steps.dense(model, **self._keeping("dense"))

    def _cluster(self, model: Model) -> Model:
        plan = self._plan()
        clustered = self.steps.cluster(model, plan)
        if plan.measured is None:
            plan = dataclasses.replace(plan, measured=measured_kl(model, clustered, plan, self.work.text))
            self._keep_plan(plan)
        # An attempt that is killed here leaves a plan that has `measured` already: the model gets it in any case.
        return clustered.replace(plan=plan)

    def _gate(self, stage: str, after: Model) -> Record:
        """What surgery did to the model's predictions, and a loud warning where that is too much."""
        if stage not in ("cluster", "quantize"):
            return {}
        gate = Gate.between(self.model, after, self.work.text)
        if gate.kl > self.config.gate:
            console.print(f"warning: {stage} {gate.explain(self.config.gate)}", style="bold red", highlight=False)
        return {"gate": dataclasses.asdict(gate)}

    def _distil(self, model: Model) -> Model:
        return self.steps.distil(model, self.teacher or self.dense, **self._keeping("distil"))

    def _target(self, model: Model) -> Model:
        return self.steps.target(model, self._plan(), **self._keeping("target"))

    def _plan(self) -> Plan:
        """The plan of this run: given, made by an earlier attempt, or made now from the dense model."""
        path = self.folder.path / "plan.json"
        if not agreed(path.exists()):
            costs, picture = self.folder.path / "costs.json", self.folder.path / "report" / "heads"
            self._keep_plan(plan_for(self.dense, self.work, self.config.planning, self.config.seed, costs, picture))
        return Plan.read(path)

    def _take_plan(self, given: Plan) -> None:
        """Begin with the plan that was given. An earlier attempt's must be the same, except for `measured`."""
        path = self.folder.path / "plan.json"
        if not agreed(path.exists()):
            self._keep_plan(given)
        elif Plan.read(path) not in (given, dataclasses.replace(given, measured=Plan.read(path).measured)):
            raise InputError(
                f"{self.config.plan} is not the plan that the run in {self.folder.path} began with; expected the same: "
                "choose another --out for another plan"
            )

    def _keep_plan(self, plan: Plan) -> None:
        scores = {
            "method": plan.method,
            "layers": list(plan.sensitivity),
            "tiers": [layer.tier for layer in plan.layers],
        }
        once(lambda: write_json(self.folder.path / "sensitivity.json", scores))
        once(lambda: write_json(self.folder.path / "plan.json", plan.to_json()))

    def report(self) -> Record:
        """Time all stages side by side, write results.json, model/ and report/ with its page, and print the table."""
        path = self.folder.path
        results = path / "results.json"
        if not agreed(results.exists()):
            self._stop_if_asked("the report")
            models = {name: self._load(at, name) for at, name in enumerate(self.done)}
            timed = latency(models)
            records = [{**self.folder.record(at, name), "latency": timed[name]} for at, name in enumerate(self.done)]
            chosen = choose(self.config.select, records, lambda stage: self._held_out_cost(models[stage]))
            once(lambda: self._write_results(records, chosen))
        page = path / "report" / "report.html"
        if not agreed(page.exists()):
            once(lambda: write_page([path], page, page.parent))
        records = read_records(results)
        print_table(terminal(records, f"{self.config.model} on {self.work.name}"))
        return {"out": str(path), "stages": [summary(record) for record in records]}

    def _write_results(self, records: list[Record], chosen: int) -> None:
        path = self.folder.path
        (path / "report" / "report.html").unlink(missing_ok=True)  # one of other results, which were deleted
        write_text(path / "report" / "results.md", markdown(records))
        write_text(path / "report" / "results.csv", as_csv(records))
        shutil.rmtree(path / "model", ignore_errors=True)
        with new_folder(path / "model") as copy:
            best = self.folder.stage_path(chosen, self.done[chosen])
            shutil.copytree(best / "model", copy, dirs_exist_ok=True)
        write_json(path / "results.json", finite(records))

    def _held_out_cost(self, model: Model) -> float:
        """1 - accuracy (or, of a text, the loss) on held-out training examples."""
        metrics = self.work.judge(model).metrics()
        return 1 - metrics["acc"] if "acc" in metrics else metrics["loss"]


def choose(select: str, records: list[Record], held_out_cost: Callable[[str], float]) -> int:
    """The place of the stage that becomes `model/`: the best after the dense one, of equals the later; else 0."""
    costs: dict[str, Callable[[int], float]] = {
        "last": lambda at: -at,
        "latency": lambda at: records[at]["latency"]["decode_ms_per_token"]["median"],
        "size": lambda at: records[at]["kv_bytes_per_token"],
        "accuracy": lambda at: held_out_cost(records[at]["stage"]),
    }
    return min(reversed(range(1, len(records))), key=costs[select], default=0)


def summary(record: Record) -> Record:
    """What the last line of stdout says of a stage."""
    metrics = record["metrics"]
    score = ("acc", "acc_stderr") if "acc" in metrics else ("perplexity", "perplexity_stderr")
    sizes = ("kv_bytes_per_token", "kv_reduction", "model_bytes")
    return {
        "stage": record["stage"],
        **{name: metrics[name] for name in (*score, "n")},
        **{name: record[name] for name in sizes},
    }
