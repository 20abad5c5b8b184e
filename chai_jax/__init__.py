"""Make an OPT language model cheaper to serve, in JAX: cluster, distil, quantize, tune, and measure."""

from importlib import import_module
from typing import Any

# The public names, in the order data flows. Each is imported when it is first asked for, so that `chai-jax --help` and
# scripts that need one part do not wait for all.
HOMES = {
    "InputError": "errors",
    "Plan": "spec",
    "Spec": "spec",
    "Example": "data.batches",
    "TASKS": "data.tasks",
    "load_rows": "data.tasks",
    "Model": "model.model",
    "load": "files.store",
    "save": "files.store",
    "export": "files.hf",
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
    "Result": "measure.evaluate",
    "evaluate": "measure.evaluate",
    "perplexity": "measure.evaluate",
    "latency": "measure.bench",
    "verify": "measure.verify",
}

__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'chai_jax' has no attribute {name!r}")
    return getattr(import_module(f"chai_jax.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
