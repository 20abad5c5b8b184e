"""What the makers of accelerators state: peak rates of a chip, and of the devices that JAX shows of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peak:
    """Peak rates of a chip, dense.

    Attributes:
        flops: bfloat16 multiplications and additions a second.
        hbm: bytes a second to and from HBM; None where nothing here needs it.
        ici: bytes a second sent to other chips, all links together, one way; None likewise.
    """

    flops: float
    hbm: float | None = None
    ici: float | None = None

    def part(self, devices: int) -> "Peak":
        """The share of each of the `devices` that a chip is shown as."""
        hbm, ici = (None if rate is None else rate / devices for rate in (self.hbm, self.ici))
        return Peak(self.flops / devices, hbm, ici)


# By JAX's name of the device; the first that a device's kind begins with. TPUs: docs.cloud.google.com/tpu/docs/
# {v2,v3,v4,v5e,v5p,v6e}; links of v2 and v3: Jouppi et al. 2020 (CACM 63:7), table 3. GPUs: NVIDIA's data sheets, those
# of L40 and L40S as mullet.se/product.html?product_id=355414 quotes them (BFLOAT16 Tensor Core without sparsity).
CHIPS: Mapping[str, Peak] = {
    "TPU v2": Peak(46e12, 700e9, 4 * 62e9),
    "TPU v3": Peak(123e12, 900e9, 4 * 82e9),
    "TPU v4": Peak(275e12, 1228e9, 300e9),
    "TPU v5 lite": Peak(197e12, 819e9, 200e9),
    "TPU v5": Peak(459e12, 2765e9, 600e9),
    "TPU v6 lite": Peak(918e12, 1640e9, 400e9),
    "NVIDIA H200": Peak(989e12),
    "NVIDIA H100 PCIe": Peak(756e12),
    "NVIDIA H100": Peak(989e12, 3352e9, 450e9),
    "NVIDIA A100": Peak(312e12),
    "NVIDIA L40S": Peak(362.05e12),
    "NVIDIA L40": Peak(181.05e12),
    "NVIDIA L4": Peak(121e12),
    "Tesla V100": Peak(125e12),
    "Tesla T4": Peak(65e12),
}


def peak(device: Any) -> Peak | None:
    """Peak rates of a JAX device; None where they are not known, as of CPUs.

    A TPU chip has one or two cores. It shows them as two devices at the same coordinates (v2 and v3 always, v4 to
    libtpu's compiler) or as one (v4 on its own machines, and all later ones).
    """
    chip = next((rates for name, rates in CHIPS.items() if device.device_kind.startswith(name)), None)
    if chip is None or device.platform != "tpu":
        return chip
    return chip.part(sum(other.coords == device.coords for other in device.client.devices()))
