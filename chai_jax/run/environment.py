"""What a number was measured on: versions, devices, dtype."""

import platform
from importlib import metadata
from typing import Any

import jax
import numpy as np

from chai_jax.machine.canaries import outcomes
from chai_jax.model import kernels
from chai_jax.model.kernels import cpu
from chai_jax.model.model import compute_dtype
from chai_jax.model.quantized import Int4Array, QuantizedArray
from chai_jax.model.sharding import current_layout
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


def where_computed() -> dict[str, Any]:
    """Devices, processes, mesh and dtype of the computation, and what becomes of quantized weights in it."""
    devices, layout = jax.devices(), current_layout()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": jax.process_count(),
        "mesh": {**layout.mesh.shape, "fsdp": layout.fsdp},
        "compute_dtype": str(np.dtype(compute_dtype())),
        "quantized_weights": _quantized_weights(),
    }


def _quantized_weights() -> str:
    """What becomes of them where tokens are made (`chai_jax.serve.decode.expands`)."""
    int8, int4 = (expands(kind, compute_dtype()) for kind in (QuantizedArray, Int4Array))
    if int8 == int4:
        return "expanded before the first token" if int8 else "read as stored"
    return "int8 read as stored, int4 expanded before the first token"


def environment() -> dict[str, Any]:
    """All of it, for `chai-jax env`, with what new tokens are attended by; of one CPU, what keeps it from its kernels;
    and whether this jax computes rightly on CPUs (`chai_jax.machine.canaries`)."""
    attention = kernels.resolved("auto", jax.devices())
    without = kernels.one_cpu(jax.devices()) and attention != "native"
    about = {"no_kernels": cpu.why_not()} if without else {}
    system = {"machine": platform.machine(), "system": platform.system(), "canaries": outcomes()}
    return {"versions": versions(), **where_computed(), "attention": attention, **about, **system}
