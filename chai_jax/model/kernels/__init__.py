"""Attention as Pallas kernels, which keep scores in fast memory: of one new token, and of a whole prompt.

They compute what `chai_jax.model.attention` does. On one NVIDIA GPU, where that was timed (experiments/bench_gpu.py),
new tokens attend by their kernel unless `using` says otherwise; on TPUs, where nothing was, kernels are an option. XLA
cannot partition them: only programs of one device may be traced with them (`check`).
"""

from contextlib import AbstractContextManager
from typing import Any

import jax

from chai_jax.errors import InputError

LANES = 128  # of a TPU's vectors
NO_MOSAIC = ("TPU v2", "TPU v3")  # their kernels multiply float32 only
OLDEST_GPU = 8.0  # compute capability: Ampere, the first with bfloat16
_choice = jax.make_user_context("auto")  # part of the key of jit's cache: programs of either kind do not mix


def using(attention: str) -> AbstractContextManager[None]:
    """Within the block, programs that are traced attend as it says: "xla", "pallas" (kernels), or "auto"."""
    return _choice(attention)


def for_tokens() -> bool:
    """Whether programs traced here attend with a kernel where they decode: if asked, or on one NVIDIA GPU."""
    return _choice.value == "pallas" or (_choice.value == "auto" and one_gpu(jax.devices()))


def for_prompts() -> bool:
    """Whether programs traced here attend with a kernel where they read long prompts: if asked."""
    return _choice.value == "pallas"


def one_gpu(devices: Any) -> bool:
    """Whether these are one NVIDIA GPU that is new enough for the kernel."""
    return len(devices) == 1 and devices[0].platform == "gpu" and _capability(devices[0]) >= OLDEST_GPU


def resolved(attention: str, devices: Any) -> str:
    """ "xla" or "pallas": what `attention` means for programs of these devices.

    Raises:
        InputError: see `check`.
    """
    check(attention, devices)
    return ("pallas" if one_gpu(devices) else "xla") if attention == "auto" else attention


def _capability(device: Any) -> float:
    """The compute capability of an NVIDIA GPU; 0 of others."""
    return float(device.compute_capability) if device.device_kind.startswith("NVIDIA") else 0.0


def check(attention: str, devices: Any) -> None:
    """Raise InputError unless programs for these devices can attend with `attention`."""
    if attention != "pallas":
        return
    kind, platform = devices[0].device_kind, devices[0].platform
    expected = "expected auto or xla, or one NVIDIA GPU from Ampere on, or one TPU from v4 on"
    old = _capability(devices[0]) < OLDEST_GPU if platform == "gpu" else kind.startswith(NO_MOSAIC)
    if platform not in ("tpu", "gpu") or old:
        raise InputError(f"--attention pallas has no kernel for {kind}; {expected}")
    if len(devices) > 1:
        raise InputError(f"--attention pallas is for one device, not for {len(devices)}; {expected}")
