"""What a number was measured on: versions, devices, dtype."""

import platform
from importlib import metadata
from typing import Any

import jax

from chai_jax.machine.canaries import outcomes
from chai_jax.model.execution import Execution
from chai_jax.model.kernels import cpu, one_cpu
from chai_jax.model.quantized import Int4Array, QuantizedArray
from chai_jax.serve.decode import expands

PACKAGES = ("chai_jax", "jax", "jaxlib", "flax", "optax", "transformers", "datasets", "scikit-learn", "kneed")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def where_computed(how: Execution | None = None) -> dict[str, Any]:
    """Devices, processes, mesh and dtype of the computation, and what becomes of quantized weights in it.

    Args:
        how: what its models ran by, their `Model.how`; that of models which nothing was said of, if not given.
    """
    how = how or Execution.choose()
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": jax.process_count(),
        "mesh": {**how.layout.mesh.shape, "fsdp": how.layout.fsdp},
        "compute_dtype": how.dtype.name,
        "quantized_weights": _quantized_weights(how),
    }


def _quantized_weights(how: Execution) -> str:
    """What becomes of them where tokens are made (`chai_jax.serve.decode.expands`)."""
    int8, int4 = (expands(kind, how) for kind in (QuantizedArray, Int4Array))
    if int8 == int4:
        return "expanded before the first token" if int8 else "read as stored"
    return "int8 read as stored, int4 expanded before the first token"


def environment(how: Execution) -> dict[str, Any]:
    """All of it, for `chai-jax env`, with what new tokens are attended by; of one CPU, what keeps it from its kernels;
    and whether this jax computes rightly on CPUs (`chai_jax.machine.canaries`)."""
    without = one_cpu(jax.devices()) and how.kernels != "native"
    about = {"no_kernels": cpu.why_not()} if without else {}
    system = {"machine": platform.machine(), "system": platform.system(), "canaries": outcomes()}
    return {"versions": versions(), **where_computed(how), "attention": how.kernels, **about, **system}
