"""What was freed goes back to the system."""

import resource
from pathlib import Path

import pytest

from chai_jax.machine import memory


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


@pytest.mark.skipif(memory._trim() is None, reason="another allocator than glibc's")
def test_what_was_freed_goes_back() -> None:
    """Below a block that stays, where the allocator itself gives nothing back."""
    blocks = [bytearray(100_000) for _ in range(1000)]  # each too small for a mapping of its own
    stays = bytearray(100_000)
    del blocks
    before = resident()
    memory.give_back_freed()
    assert before - resident() > 50_000_000
    assert not any(stays)


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory._trim.cache_clear()
    try:
        memory.give_back_freed()
        assert memory._trim() is None
    finally:
        memory._trim.cache_clear()
