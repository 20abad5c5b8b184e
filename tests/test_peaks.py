"""Peak rates: a device has its share of its chip."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from chai_jax.peaks import CHIPS, peak


def device(kind: str, platform: str, coords: list[list[int]]) -> Any:
    """The first of a machine's devices, at these coordinates."""
    client = SimpleNamespace()
    found = [SimpleNamespace(device_kind=kind, platform=platform, coords=at, client=client) for at in coords]
    client.devices = lambda: found
    return found[0]


@pytest.mark.parametrize(
    ("kind", "per_chip", "flops"),
    [
        ("TPU v2", 2, 23e12),
        ("TPU v3", 2, 61.5e12),
        ("TPU v4", 2, 137.5e12),
        ("TPU v4", 1, 275e12),
        ("TPU v5 lite", 1, 197e12),
        ("TPU v5p", 1, 459e12),
        ("TPU v6 lite", 1, 918e12),
    ],
)
def test_a_tpu_has_its_share_of_a_chip(kind: str, per_chip: int, flops: float) -> None:
    coords = [[chip, 0, 0] for chip in range(4) for _ in range(per_chip)]
    found = peak(device(kind, "tpu", coords))
    assert found is not None
    assert found.flops == flops
    chip = CHIPS[kind.removesuffix("p")]
    assert chip.hbm is not None
    assert found.hbm == chip.hbm / per_chip


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_a_gpu_is_known_by_how_its_name_begins(kind: str, flops: float) -> None:
    found = peak(device(kind, "gpu", [[0, 0, 0]] * 8))
    assert found is not None
    assert found.flops == flops


def test_a_cpu_is_not_known() -> None:
    assert peak(jax.devices()[0]) is None
