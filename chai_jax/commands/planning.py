"""`chai-jax plan` and `explain`: which heads to merge and what to store how."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from chai_jax.config import DeviceConfig, PlanConfig, RunConfig, check_seed
from chai_jax.console import print_table


@dataclass(frozen=True)
class PlanCommand:
    """Decide which heads to merge and what to store how; writes a plan.json a person can edit."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("plan.json")
    """Where to write the plan."""
    task: str | None = None
    """Calibrate on this task's training prompts (sst2, rte, piqa)."""
    text: Path | None = None
    """Calibrate on this text file instead."""
    data_dir: Path | None = None
    """Folder holding TASK/train.jsonl[.gz]."""
    seed: int = 0
    """Seed of the clustering."""
    planning: PlanConfig = field(default_factory=PlanConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.analyse.explain import explain, explain_table
        from chai_jax.files.atomic import claim_file, write_json
        from chai_jax.machine.processes import once
        from chai_jax.run.devices import start
        from chai_jax.run.options import plan_for
        from chai_jax.run.work import open_work
        from chai_jax.sources import open_model, source_of

        execution = start(self.devices)
        check_seed(self.seed, "--seed")
        self.planning.check()
        out = claim_file(self.out)
        planning = self.planning.filled(source_of(self.model).planning)
        config = RunConfig(
            self.model, task=self.task, text=self.text, data_dir=self.data_dir, seed=self.seed, planning=planning
        )
        model = open_model(self.model, seed=self.seed, execution=execution)
        costs = self.out.with_suffix(".costs.json")
        plan = plan_for(model, open_work(config, model), planning, self.seed, costs, self.out.with_suffix(".heads"))
        once(lambda: write_json(out, plan.to_json()))
        print_table(explain_table(plan, model.config))
        return {"plan": str(self.out), "layers": explain(plan, model.config)}


@dataclass(frozen=True)
class ExplainCommand:
    """Print a plan as a table: per layer tier, clusters, formats and cache bytes."""

    plan: Positional[Path]
    """A plan.json."""
    model: str | None = None
    """The model it is for, to say what it costs in cache bytes."""

    def run(self) -> Any:
        from chai_jax.analyse.explain import explain, explain_table
        from chai_jax.plans.plan import Plan
        from chai_jax.sources import open_model

        plan = Plan.read(self.plan)
        config = None if self.model is None else open_model(self.model).config
        print_table(explain_table(plan, config))
        return {"layers": explain(plan, config)}
