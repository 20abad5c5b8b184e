"""Programs for a GPU that is not here; what needs jax's CUDA plugin is skipped without it."""

import dataclasses
from typing import Any

import pytest

from chai_jax.aot import gpu
from chai_jax.aot.compiled import largest_batch, measure
from chai_jax.aot.programs import AbstractModel, Job, dense_spec, spec_of
from chai_jax.aot.tpu import mesh_of
from chai_jax.cli import main
from chai_jax.errors import InputError
from chai_jax.machine.peaks import CHIPS
from chai_jax.model.cache import bytes_per_token, cache_bytes
from chai_jax.model.kernels.packed_gpu import UNTRIED
from chai_jax.model.sharding import Layout
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec

SMALL = Architecture(4096, 256, 1, 4, 512, 256, 256)
needs_plugin = pytest.mark.skipif(gpu.compiler_package() is None, reason="jax's CUDA plugin is not installed")


def abstract(spec: Spec | None = None) -> AbstractModel:
    return AbstractModel(SMALL, spec or dense_spec(SMALL), Layout(mesh_of(gpu.topology("h100"))))


@needs_plugin
@pytest.mark.parametrize("attention", ["xla", "pallas"])
def test_a_token_of_decoding(attention: str) -> None:
    """The compiler's bytes are those of weights and cache; the cache is updated in place; the kernel is accepted."""
    moved, caches = [], []
    for spec in (dense_spec(SMALL), spec_of(SMALL, None, "qkv", 0.5, "int8")):
        record = measure(Job("decode", 256, 256, attention=attention), abstract(spec))
        cache = 256 * 256 * bytes_per_token(spec)
        entries = 4096 * 256 + (4 if spec.is_dense else 2) * 256 * 256 + 2 * 256 * 512
        assert record["fits"]
        assert record["hbm"]["arguments"] == pytest.approx(cache + 2 * (entries + 258 * 256), rel=0.05)
        assert cache <= record["hbm"]["aliased"] <= 1.05 * cache
        assert record["roofline"]["memory_ms"] * 3352e6 == pytest.approx(record["hbm_bytes"])
        # Attention's own, which a kernel hides, are few at 256 columns.
        assert 2 * 256 * entries <= record["flops"] <= 1.35 * 2 * 256 * entries
        moved.append(record["hbm_bytes"])
        caches.append(cache)
    assert moved[0] - moved[1] == pytest.approx(caches[0] - caches[1], rel=0.2)


@needs_plugin
@pytest.mark.parametrize("storage", ["k3v4", "int4"])
def test_blocks_of_few_bits_are_read_as_they_are_stored(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler accepts the kernel, there is no second cache, expanded or not, and none of it is copied: what is
    moved beside the cache and the weights is the newest block, which is quantized at every token."""
    monkeypatch.setenv(UNTRIED, "1")
    config = dataclasses.replace(SMALL, max_positions=2048)
    model = AbstractModel(config, dense_spec(config, storage), abstract().layout)
    record, cached = measure(Job("decode", 64, 2048, attention="pallas"), model), cache_bytes(model.spec, 64, 2048)
    assert record["hbm"]["temporaries"] < cached / 2
    assert cached < record["hbm_bytes"] < 3 * cached


@needs_plugin
def test_a_prompt() -> None:
    """With cuDNN no scores of pairs go to memory and back; the last layer has none for the newest token alone."""
    config = dataclasses.replace(SMALL, num_layers=2)
    two = AbstractModel(config, dense_spec(config), abstract().layout)
    moved = [measure(Job("prefill", 8, 256, attention=how), two)["hbm_bytes"] for how in ("xla", "pallas")]
    pairs = 8 * SMALL.num_heads * 256 * 256
    assert moved[0] - moved[1] > 4 * pairs


@needs_plugin
def test_what_does_not_fit_is_refused_and_the_search_ends_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 60 * 2**20
    monkeypatch.setattr(gpu, "limit", lambda device: most)
    found = largest_batch(lambda batch: measure(Job("decode", batch, 256), abstract()), 1, 64, tell=lambda line: None)
    fits, does_not, sequence = found["fitting"], found["failing"], 256 * bytes_per_token(dense_spec(SMALL))
    assert fits["hbm"]["at_most"] <= most < does_not["hbm_needed"] < most + 1.1 * sequence
    assert found["too_large"] == found["largest"] + 1
    assert does_not["message"] == f"the program needs {does_not['hbm_needed']:,} bytes; JAX may take {most:,}"


def test_without_the_plugin_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "entry_points", lambda group: [])
    assert gpu.compiler_package() is None
    with pytest.raises(InputError, match=r"no compiler for NVIDIA's GPUs here; expected .*: pip install"):
        gpu.topology("h100")
    assert main(["aot", "facebook/opt-125m", "--topology", "h100"]) == 2
    assert "pip install 'chai_jax[cuda]'" in capsys.readouterr().err


def test_descriptions_agree_with_what_else_is_known_of_a_chip() -> None:
    for text in gpu.DESCRIPTIONS.values():
        (name,) = [name for name in gpu.MEMORY if f'name: "{name}"' in text]
        peak = next(rates for chip, rates in CHIPS.items() if name.startswith(chip))
        assert float(text.split("memory_bandwidth: ")[1].split()[0]) == pytest.approx(peak.hbm, rel=1e-3)


@pytest.mark.parametrize("error", [NotImplementedError("not implemented"), ValueError("no such field\nat all")])
def test_a_compiler_that_does_not_load_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(gpu, "compiler_package", lambda: "jax-cuda12-pjrt")
    monkeypatch.setattr(gpu.topologies, "get_topology_desc", refuse)
    with pytest.raises(InputError, match=r"knows no h100 \(no[a-z ]+\); expected jax-cuda12-pjrt as this jax needs it"):
        gpu.topology("h100")
