"""TPUs that are not here: their devices as libtpu's compiler knows them, and the least time a program takes on them."""

import os
import re
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from chai_jax.aot.cost import ProgramCost
from chai_jax.errors import InputError
from chai_jax.machine.peaks import CHIPS, peak

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
            f"no topology {name!r} ({reason}); expected a name such as v3:2x2, v4:2x2x1, v5e:2x4, v6e:2x4 or h100"
        ) from None
    if peak(devices[0]) is None:
        raise InputError(f"{name} has devices {devices[0].device_kind!r}; expected one of {', '.join(CHIPS)}")
    return tuple(devices)


def mesh_of(devices: tuple[Any, ...], shape: str | None = None) -> Mesh:
    """The devices as a mesh of data x model, such as `4x2` (default: all along data); `1x1` is one of them.

    Raises:
        InputError: the shape is not that of all devices.
    """
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", f"{len(devices)}x1" if shape is None else shape)
    sizes = [int(size) for size in found.groups()] if found else []
    devices = devices[:1] if sizes == [1, 1] else devices
    if len(sizes) != 2 or sizes[0] * sizes[1] != len(devices):
        raise InputError(
            f"a mesh of {shape!r} is not one of {len(devices)} devices; expected DATAxMODEL, such as "
            f"{f'{len(devices) // 2}x2' if len(devices) > 1 else '1x1'}"
        )
    return Mesh(np.array(devices).reshape(sizes), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def roofline(cost: ProgramCost, device: Any) -> dict[str, float | str]:
    """The least milliseconds a program can take, by compute, memory and interconnect, and which of them is the bound.

    Roofline (Williams et al. 2009, CACM 52:4): each of the three works at its peak rate, and all at the same time. Real
    programs take longer. `peaks` names the rates.
    """
    rates = peak(device)
    assert rates is not None
    assert rates.hbm
    assert rates.ici
    times = {
        "compute": 1e3 * cost.flops / rates.flops,
        "memory": 1e3 * cost.hbm_bytes / rates.hbm,
        "interconnect": 1e3 * cost.sent_bytes / rates.ici,
    }
    bound = max(times, key=lambda name: times[name])
    peaks = f"{rates.flops / 1e12:g} TFLOP/s, HBM {rates.hbm / 1e9:g} GB/s, links {rates.ici / 1e9:g} GB/s"
    return {"ms": times[bound], "bound": bound, **{f"{name}_ms": time for name, time in times.items()}, "peaks": peaks}
