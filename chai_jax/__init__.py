"""Make a language model cheaper to serve, in JAX: cluster, distil, quantize, tune, and measure."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The public names, in the order data flows. Each is imported when it is first asked for, so that `chai-jax --help` and
# scripts that need one part do not wait for all. Type checkers read the same names below.
HOMES = {
    "InputError": "errors",
    "Plan": "plans.plan",
    "Spec": "plans.spec",
    "Example": "data.batches",
    "TASKS": "data.tasks",
    "get_task": "data.tasks",
    "load_rows": "data.tasks",
    "Execution": "model.execution",
    "Model": "model.model",
    "to_flax": "model.flax_module",
    "from_flax": "model.flax_module",
    "load": "files.store",
    "save": "files.store",
    "export": "files.export",
    "Probe": "analyse.probe",
    "probe": "analyse.probe",
    "plan": "analyse.planner",
    "cluster": "compress.cluster",
    "quantize": "compress.quantize",
    "with_storage": "compress.quantize",
    "expand": "compress.expand",
    "finetune": "adapt.finetune",
    "distil": "adapt.distil",
    "target": "adapt.target",
    "generate": "serve.generate",
    "warm_up": "serve.generate",
    "Result": "evaluation.result",
    "evaluate": "evaluation.tasks",
    "perplexity": "evaluation.tasks",
    "latency": "bench.race",
    "verify": "evaluation.verify",
}

if TYPE_CHECKING:
    from chai_jax.adapt.distil import distil as distil
    from chai_jax.adapt.finetune import finetune as finetune
    from chai_jax.adapt.target import target as target
    from chai_jax.analyse.planner import plan as plan
    from chai_jax.analyse.probe import Probe as Probe
    from chai_jax.analyse.probe import probe as probe
    from chai_jax.bench.race import latency as latency
    from chai_jax.compress.cluster import cluster as cluster
    from chai_jax.compress.expand import expand as expand
    from chai_jax.compress.quantize import quantize as quantize
    from chai_jax.compress.quantize import with_storage as with_storage
    from chai_jax.data.batches import Example as Example
    from chai_jax.data.tasks import TASKS as TASKS
    from chai_jax.data.tasks import get_task as get_task
    from chai_jax.data.tasks import load_rows as load_rows
    from chai_jax.errors import InputError as InputError
    from chai_jax.evaluation.result import Result as Result
    from chai_jax.evaluation.tasks import evaluate as evaluate
    from chai_jax.evaluation.tasks import perplexity as perplexity
    from chai_jax.evaluation.verify import verify as verify
    from chai_jax.files.export import export as export
    from chai_jax.files.store import load as load
    from chai_jax.files.store import save as save
    from chai_jax.model.execution import Execution as Execution
    from chai_jax.model.flax_module import from_flax as from_flax
    from chai_jax.model.flax_module import to_flax as to_flax
    from chai_jax.model.model import Model as Model
    from chai_jax.plans.plan import Plan as Plan
    from chai_jax.plans.spec import Spec as Spec
    from chai_jax.serve.generate import generate as generate
    from chai_jax.serve.generate import warm_up as warm_up

__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'chai_jax' has no attribute {name!r}")
    return getattr(import_module(f"chai_jax.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
