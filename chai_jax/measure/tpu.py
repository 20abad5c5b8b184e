"""TPUs that are not here: their devices as libtpu's compiler knows them, and the peak rates of their cores."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from chai_jax.errors import InputError
from chai_jax.measure.cost import Cost

# Without these libtpu asks for the metadata of the TPU it takes this machine to be, and may wait for ever.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v3-8",  # any will do: without one it only complains
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Compiling needs no TPU, so several processes may have libtpu at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Core:
    """Peak rates of one JAX device: a core where a chip has two that work apart (v2, v3), else a chip.

    Attributes:
        flops: bfloat16 multiplications and additions a second.
        hbm: bytes a second to and from HBM.
        ici: bytes a second sent to other chips, all links together, one way; a core's half where two share a chip.
        note: what the figures are.
    """

    flops: float
    hbm: float
    ici: float
    note: str


# By JAX's name of the device. Chip figures: docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e}; links of v2 and v3:
# Jouppi et al. 2020 (CACM 63:7), table 3. A chip with two cores counts half for each.
CORES = {
    "TPU v2": Core(23e12, 350e9, 124e9, "half of 46 TFLOP/s, 700 GB/s, 4 x 496 Gbit/s"),
    "TPU v3": Core(61.5e12, 450e9, 164e9, "half of 123 TFLOP/s, 900 GB/s, 4 x 656 Gbit/s"),
    "TPU v4": Core(137.5e12, 614e9, 150e9, "half of 275 TFLOP/s, 1,228 GB/s, 2,400 Gbit/s"),
    "TPU v5 lite": Core(197e12, 819e9, 200e9, "197 TFLOP/s, 819 GB/s, 1,600 Gbit/s"),
    "TPU v5": Core(459e12, 2765e9, 600e9, "459 TFLOP/s, 2,765 GB/s, 4,800 Gbit/s"),
    "TPU v6 lite": Core(918e12, 1640e9, 400e9, "918 TFLOP/s, 1,640 GB/s, 400 GB/s each way"),
}


def topology(name: str) -> tuple[Any, ...]:
    """The devices of a TPU slice, such as `v3:2x2` (a v3-8), `v5e:2x4` or `v6e:2x4`; none of them can run anything.

    Raises:
        InputError: libtpu is not installed, or knows no such slice.
    """
    if find_spec("libtpu") is None:
        raise InputError(
            "libtpu, the TPU compiler, is not installed; expected the one that fits this jax: pip install "
            "'chai_jax[tpu]'"
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        devices: Any = topologies.get_topology_desc(topology_name=name, platform="tpu").devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"no topology {name!r} ({reason}); expected a name such as v3:2x2, v4:2x2x1, v5e:2x4 or v6e:2x4"
        ) from None
    if devices[0].device_kind not in CORES:
        raise InputError(f"{name} has devices {devices[0].device_kind!r}; expected one of {', '.join(CORES)}")
    return tuple(devices)


def mesh_of(devices: tuple[Any, ...], shape: str | None = None) -> Mesh:
    """The devices as a mesh of data x model, such as `4x2` (all along data, if not said otherwise).

    Raises:
        InputError: the shape is not that of all devices.
    """
    sizes = [int(size) for size in re.findall(r"\d+", shape or f"{len(devices)}x1")]
    if len(sizes) != 2 or sizes[0] * sizes[1] != len(devices):
        raise InputError(
            f"a mesh of {shape!r} is not one of {len(devices)} devices; expected DATAxMODEL, such as "
            f"{len(devices) // 2}x2"
        )
    return Mesh(np.array(devices).reshape(sizes), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def roofline(cost: Cost, device_kind: str) -> dict[str, float | str]:
    """The least milliseconds a program can take, by compute, memory and interconnect, and which of them is the bound.

    Williams et al. 2009 (CACM 52:4): each alone at its peak rate, all at once. No program comes down to it.
    """
    core = CORES[device_kind]
    times = {
        "compute": 1e3 * cost.flops / core.flops,
        "memory": 1e3 * cost.hbm_bytes / core.hbm,
        "interconnect": 1e3 * cost.sent_bytes / core.ici,
    }
    bound = max(times, key=lambda name: times[name])
    return {"ms": times[bound], "bound": bound, **{f"{name}_ms": time for name, time in times.items()}}
