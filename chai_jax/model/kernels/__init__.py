"""Attention as Pallas kernels, which keep scores in fast memory: of one new token, and of a whole prompt.

They compute what `chai_jax.model.attention` does. They are an option (`using`), since they have been timed on no
accelerator so far. XLA cannot partition them: only programs of one device may be traced with them (`check`).
"""

from contextlib import AbstractContextManager
from typing import Any

import jax

from chai_jax.errors import InputError

LANES = 128  # of a TPU's vectors
NO_MOSAIC = ("TPU v2", "TPU v3")  # their kernels multiply float32 only
_choice = jax.make_user_context("xla")  # part of the key of jit's cache: programs of either kind do not mix


def using(attention: str) -> AbstractContextManager[None]:
    """Within the block, programs that are traced attend with `attention`: "xla" (the default), or "pallas"."""
    return _choice(attention)


def chosen() -> bool:
    """Whether programs traced here attend with the kernels."""
    return _choice.value == "pallas"


def check(attention: str, devices: Any) -> None:
    """Raise InputError unless programs for these devices can attend with `attention`."""
    if attention == "xla":
        return
    kind = devices[0].device_kind
    expected = "expected xla, or one NVIDIA GPU, or one TPU from v4 on"
    if devices[0].platform not in ("tpu", "gpu", "cuda") or kind.startswith(NO_MOSAIC):
        raise InputError(f"--attention pallas has no kernel for {kind}; {expected}")
    if len(devices) > 1:
        raise InputError(f"--attention pallas is for one device, not for {len(devices)}; {expected}")
