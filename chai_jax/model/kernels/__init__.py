"""Kernels, which keep scores in fast memory: attention of one new token, and of a whole prompt.

They compute what `chai_jax.model.attention` does: in Pallas for TPUs and GPUs, by cuDNN for prompts on GPUs, in C++ for
CPUs, which have none for prompts and where products with weights are kernels as well. On one NVIDIA GPU or one CPU,
where that was timed (experiments/bench_gpu.py, `chai-jax bench`), they are used unless `using` says otherwise; on TPUs,
where nothing was, they are an option. XLA cannot split them: only programs of one device may be traced with them
(`check`).
"""

from contextlib import AbstractContextManager
from typing import Any

import jax

from chai_jax.errors import InputError
from chai_jax.model.kernels import cpu

LANES = 128  # of a TPU's vectors
NO_MOSAIC = ("TPU v2", "TPU v3")  # their kernels multiply float32 only
OLDEST_GPU = 8.0  # compute capability: Ampere, the first with bfloat16
# Parts of the key of jit's cache: programs of either kind do not mix.
_choice, _plain = jax.make_user_context("auto"), jax.make_user_context(False)


def using(attention: str) -> AbstractContextManager[None]:
    """Within the block, programs that are traced attend as it says: "xla", "pallas" (kernels of TPUs and GPUs),
    "native" (those of CPUs), or "auto"."""
    return _choice(attention)


def plain_attention() -> AbstractContextManager[None]:
    """Within the block attention is XLA's: kernels know no branches and have no scores to show. Products are free."""
    return _plain(True)


def for_tokens() -> bool:
    """Whether programs traced here attend with a kernel where they decode: if asked, or on one NVIDIA GPU or CPU."""
    return not _plain.value and (_pallas() or on_cpu())


def on_cpu() -> bool:
    """Whether programs traced here use the kernels of CPUs: if asked, or on one CPU if there is a C++ compiler."""
    wanted = _choice.value == "native" or (_choice.value == "auto" and one_cpu(jax.devices()))
    return wanted and cpu.available()


def for_prompts() -> bool:
    """Whether programs traced here attend with a kernel where they read long prompts: if asked, or on one NVIDIA
    GPU."""
    return not _plain.value and _pallas()


def _pallas() -> bool:
    return _choice.value == "pallas" or (_choice.value == "auto" and one_gpu(jax.devices()))


def one_gpu(devices: Any) -> bool:
    """Whether these are one NVIDIA GPU that is new enough for the kernel."""
    return len(devices) == 1 and devices[0].platform == "gpu" and _capability(devices[0]) >= OLDEST_GPU


def one_cpu(devices: Any) -> bool:
    """Whether these are one CPU."""
    return len(devices) == 1 and devices[0].platform == "cpu"


def resolved(attention: str, devices: Any) -> str:
    """ "xla", "pallas" or "native": what `attention` means for programs of these devices.

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
