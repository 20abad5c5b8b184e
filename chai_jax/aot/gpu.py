"""GPUs that are not here: with jax[cuda] XLA compiles for a described one, on any machine."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from chai_jax.errors import InputError

MEMORY = {"NVIDIA H100 80GB HBM3": 84942979072}  # bytes, by JAX's name of the device
USABLE = 0.95  # of it by JAX, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95; CUDA's own take is about the rest
# Bytes do not depend on which of its kernels XLA would find fastest, which it finds by running them.
OPTIONS = {"xla_gpu_autotune_level": "0"}
# As CUDA's device properties of one give them; the text is a `stream_executor.GpuTargetConfigProto`.
DESCRIPTIONS: Mapping[str, str] = {
    "h100": f"""
        gpu_device_info {{
          name: "NVIDIA H100 80GB HBM3"
          device_vendor: "NVIDIA Corporation"
          cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
          platform_version: "Compute Capability 9.0a"
          driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.10.0"
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          device_memory_size: {MEMORY["NVIDIA H100 80GB HBM3"]} memory_bandwidth: 3352320000000 l2_cache_size: 52428800
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          device_address_bits: 64
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "NVIDIA H100 80GB HBM3"
    """,
}


def compiler_package() -> str | None:
    """The package with jax's compiler for NVIDIA's GPUs, such as jax-cuda12-pjrt; None if there is none."""
    names = [entry.name for entry in entry_points(group="jax_plugins") if entry.name.startswith("xla_cuda")]
    return f"jax-{names[0].removeprefix('xla_')}-pjrt" if names else None


def topology(name: str) -> tuple[Any, ...]:
    """One GPU of a described kind, which cannot run anything.

    Raises:
        InputError: jax has no compiler for NVIDIA's GPUs here, or it does not load.
    """
    if compiler_package() is None:
        raise InputError(
            "jax has no compiler for NVIDIA's GPUs here; expected the one that fits this jax: pip install "
            "'chai_jax[cuda]'"
        )
    described = {"topology": "1x1x1", "target_config": DESCRIPTIONS[name]}
    try:
        return tuple(topologies.get_topology_desc(name, "cuda", **described).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"jax's compiler for NVIDIA's GPUs does not load or knows no {name} ({reason}); expected "
            f"{compiler_package()} as this jax needs it: pip install 'chai_jax[cuda]'"
        ) from None


def limit(device: Any) -> int:
    """Bytes that a program may hold."""
    return int(USABLE * MEMORY[device.device_kind])


def targeted(device: Any) -> AbstractContextManager[Any]:
    """Within the block, kernels are lowered for this device rather than for one that is here."""
    kind = AbstractDevice(device.device_kind, None, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))
