"""How programs compute: one static value with the dtype, the devices and the kernels, passed to whatever runs a model.

Nothing is looked up elsewhere: two programs differ if their `Execution` does, and `jax.jit` keeps them apart.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from chai_jax.model.kernels import choose_kernels
from chai_jax.model.sharding import Layout, make_mesh


@dataclass(frozen=True)
class Execution:
    """What a program computes in, where, and by whose kernels. Hashable, so that it can be static under `jax.jit`.

    Attributes:
        dtype: numpy dtype of the activations, float32 or bfloat16. It never decides what is stored.
        layout: the devices, and how arrays are split over them.
        kernels: "xla" (XLA's own programs), "pallas" (kernels for TPUs and NVIDIA GPUs) or "native" (for CPUs); see
            `chai_jax.model.kernels`.
    """

    dtype: Any
    layout: Layout
    kernels: str

    @classmethod
    def choose(cls, dtype: DTypeLike | None = None, layout: Layout | None = None, kernels: str = "auto") -> "Execution":
        """What is asked for, and for the rest what suits the devices that are here.

        Args:
            dtype: if not given, float32 on CPUs, bfloat16 on TPUs and GPUs. (On CPUs bfloat16 pays where they have
                instructions for it, which not all have.)
            layout: if not given, all devices along `data`.
            kernels: "xla", "pallas", "native", or "auto": kernels where this process has one device, an NVIDIA
                GPU or a CPU, and there are kernels for it.

        Raises:
            InputError: kernels that the layout's devices do not have (see `chai_jax.model.kernels.check`).
        """
        layout = layout or Layout(make_mesh())
        if dtype is None:
            dtype = jnp.float32 if layout.platform == "cpu" else jnp.bfloat16
        devices = jax.devices() if kernels == "auto" else layout.mesh.devices.flatten()
        return cls(jnp.dtype(dtype), layout, choose_kernels(kernels, devices))

    def replace(self, **changes: Any) -> "Execution":
        """The same but for some attributes."""
        return dataclasses.replace(self, **changes)
