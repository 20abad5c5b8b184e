"""Peak rates: a device has its share of its chip."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from chai_jax.machine.peaks import CHIPS, peak


def device(kind: str, platform: str, coords: list[list[int]]) -> Any:
    """The first of a machine's devices, at these coordinates."""
    client = SimpleNamespace()
    found = [SimpleNamespace(device_kind=kind, platform=platform, coords=at, client=client) for at in coords]
    client.devices = lambda: found
    return found[0]


@pytest.mark.parametrize(
    ("kind", "per_chip", "chip"),
    [
        ("TPU v2", 2, "TPU v2"),
        ("TPU v3", 2, "TPU v3"),
        ("TPU v4", 2, "TPU v4"),
        ("TPU v4", 1, "TPU v4"),
        ("TPU v5 lite", 1, "TPU v5 lite"),
        ("TPU v5p", 1, "TPU v5"),
        ("TPU v6 lite", 1, "TPU v6 lite"),
    ],
)
def test_a_tpu_has_its_share_of_a_chip(kind: str, per_chip: int, chip: str) -> None:
    coords = [[number, 0, 0] for number in range(4) for _ in range(per_chip)]
    found, whole = peak(device(kind, "tpu", coords)), CHIPS[chip]
    assert found is not None
    assert whole.hbm is not None
    assert whole.ici is not None
    shares = [rate / per_chip for rate in (whole.flops, whole.hbm, whole.ici)]
    assert [found.flops, found.hbm, found.ici] == shares


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("NVIDIA L40", "NVIDIA L40"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_known_by_how_its_name_begins(kind: str, chip: str | None) -> None:
    """All of it, though its devices have no coordinates that differ."""
    assert peak(device(kind, "gpu", [[0, 0, 0]] * 8)) == CHIPS.get(str(chip))


def test_no_chip_is_hidden_behind_another() -> None:
    """Whose name its own begins with."""
    assert {name: peak(device(name, "gpu", [[0, 0, 0]])) for name in CHIPS} == CHIPS


def test_a_cpu_is_not_known() -> None:
    assert peak(jax.devices()[0]) is None
