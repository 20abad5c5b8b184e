"""`chai-jax plan` and `explain`: which heads to merge, and what to store in which format."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from chai_jax.commands.options import OutFile
from chai_jax.config import DeviceConfig, PlanConfig, RunConfig, check_seed
from chai_jax.console import print_table
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import Plan


@dataclass(frozen=True)
class PlanCommand:
    """Decide which heads to merge and what to store in which format; write a plan.json that you can edit."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    out: OutFile = Path("plan.json")
    """Where to write the plan."""
    task: str | None = None
    """Calibrate on the training prompts of this task: sst2, rte, piqa, hellaswag, or one that a file NAME.yaml
    describes."""
    text: Path | None = None
    """Instead of a task: calibrate on this text file."""
    data_dir: Path | None = None
    """Folder with TASK/train.jsonl and TASK/validation.jsonl, or .jsonl.gz (default: the Hugging Face hub)."""
    seed: int = 0
    """Seed of the clustering."""
    planning: PlanConfig = field(default_factory=PlanConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.analyse.explain import explain_table
        from chai_jax.files.atomic import claim_file, write_json
        from chai_jax.machine.processes import once
        from chai_jax.run.devices import start
        from chai_jax.run.options import plan_for
        from chai_jax.run.work import open_work, task_of
        from chai_jax.sources import open_model, source_of

        execution = start(self.devices)
        check_seed(self.seed, "--seed")
        self.planning.check()
        out = claim_file(self.out)
        planning = self.planning.filled(source_of(self.model).planning)
        config = RunConfig(
            self.model, task=self.task, text=self.text, data_dir=self.data_dir, seed=self.seed, planning=planning
        )
        task_of(config)  # whether there is one, before the model is read
        model = open_model(self.model, seed=self.seed, execution=execution)
        costs = self.out.with_suffix(".costs.json")
        work = open_work(config, model)
        plan = plan_for(model, work, planning, self.seed, costs, self.out.with_suffix(".heads"))
        once(lambda: write_json(out, plan.to_json()))
        print_table(explain_table(plan, model.config))
        return {"plan": str(self.out), **work.about, **explained(plan, model.config)}


@dataclass(frozen=True)
class ExplainCommand:
    """Print a plan as a table: tier, clusters and formats of every layer, and the damage it predicts."""

    plan: Positional[Path]
    """A plan.json."""
    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """The model that the plan is for: the table then has the bytes of its cache, too."""

    def run(self) -> Any:
        from chai_jax.analyse.explain import explain_table
        from chai_jax.plans.plan import Plan
        from chai_jax.sources import shape_of

        plan = Plan.read(self.plan)
        config = None if self.model is None else shape_of(self.model)
        print_table(explain_table(plan, config))
        return explained(plan, config)


def explained(plan: Plan, config: Architecture | None) -> dict[str, Any]:
    """The result of both commands: the damage in nats a token (see `Plan`), and a row for every layer."""
    from chai_jax.analyse.explain import explain

    return {"predicted": plan.predicted, "measured": plan.measured, "layers": explain(plan, config)}
