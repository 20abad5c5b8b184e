"""Kernels: attention of one new token, attention in prefill, and on CPUs also products with weights.

They compute what `chai_jax.model.attention` and `chai_jax.model.products` do, but keep what lies in between in fast
memory. Those for TPUs and GPUs are written in Pallas (prefill on GPUs is cuDNN's), those for CPUs in C++; CPUs have
none for prefill. Where several query heads read one key, a GPU's kernel for one token leaves them to XLA, but over
blocks of few bits; the others take them. Such blocks are read as they are stored (`packed`, `decode_blocks.cc`).

A program uses the kernels that its `Execution` names. By default these are the kernels of one NVIDIA GPU or of one CPU,
where they were timed (experiments/bench_gpu.py, `chai-jax bench`). A GPU's over blocks, which was not, waits to
be asked for (`packed_gpu.UNTRIED`). On TPUs, where none was, they are an option.
XLA cannot split a kernel over devices, so only programs of one device may have them (`check`).
"""

from typing import Any

from chai_jax.errors import InputError
from chai_jax.model.kernels import cpu

LANES = 128  # of a TPU's vectors
NO_MOSAIC = ("TPU v2", "TPU v3")  # their kernels multiply float32 only
OLDEST_GPU = 8.0  # compute capability: Ampere, the first with bfloat16


def one_gpu(devices: Any) -> bool:
    """Whether these are one NVIDIA GPU that is new enough for the kernel."""
    return len(devices) == 1 and devices[0].platform == "gpu" and _capability(devices[0]) >= OLDEST_GPU


def one_cpu(devices: Any) -> bool:
    """Whether these are one CPU."""
    return len(devices) == 1 and devices[0].platform == "cpu"


def choose_kernels(attention: str, devices: Any) -> str:
    """Which kernels programs of these devices have: what was asked for; or for "auto" those that were timed, or "xla".

    Raises:
        InputError: see `check`.
    """
    check(attention, devices)
    if attention != "auto":
        return attention
    return "pallas" if one_gpu(devices) else "native" if one_cpu(devices) and cpu.available() else "xla"


def _capability(device: Any) -> float:
    """The compute capability of an NVIDIA GPU; 0 of others."""
    return float(device.compute_capability) if device.device_kind.startswith("NVIDIA") else 0.0


def check(attention: str, devices: Any) -> None:
    """Raise InputError unless programs for these devices can attend with `attention`."""
    kind, platform, count = devices[0].device_kind, devices[0].platform, len(devices)
    if attention == "native":
        if platform != "cpu" or count > 1:
            raise InputError(f"--attention native is for one CPU, not for {count} x {kind}; expected auto or xla")
        if not cpu.available():
            raise InputError(f"--attention native has no kernels: {cpu.why_not()}; expected auto or xla")
    if attention != "pallas":
        return
    expected = "expected auto or xla, or one NVIDIA GPU from Ampere on, or one TPU from v4 on"
    old = _capability(devices[0]) < OLDEST_GPU if platform == "gpu" else kind.startswith(NO_MOSAIC)
    if platform not in ("tpu", "gpu") or old:
        raise InputError(f"--attention pallas has no kernel for {kind}; {expected}")
    if count > 1:
        raise InputError(f"--attention pallas is for one device, not for {count}; {expected}")
