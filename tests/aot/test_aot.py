"""Programs for TPUs against the TPU's own compiler; what needs libtpu is skipped without it."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chai_jax.aot import tpu
from chai_jax.aot.compiled import GIB, _hbm, largest_batch, measure, report
from chai_jax.aot.cost import program_cost
from chai_jax.aot.programs import AbstractModel, Job, dense_spec, lower, spec_of
from chai_jax.aot.tpu import mesh_of, topology
from chai_jax.cli import main
from chai_jax.commands.machines import AotCommand
from chai_jax.commands.options import help_of
from chai_jax.errors import InputError
from chai_jax.files.families.opt import config_fields
from chai_jax.files.published import PUBLISHED, architecture_of
from chai_jax.inputs.reading import Record
from chai_jax.model.cache import bytes_per_token, cache_bytes
from chai_jax.model.params import declare
from chai_jax.model.sharding import Layout
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.planned import uniform_plan
from chai_jax.plans.spec import Spec

SMALL = Architecture(4096, 256, 1, 4, 512, 256, 256)
LAYER_WEIGHTS = 4 * 256 * 256 + 2 * 256 * 512  # of its matrices
LIMITS = {"v3:2x2": 15.48, "v5e:2x4": 15.75}
SLICES = [pytest.param("v3:2x2", marks=pytest.mark.slow), "v5e:2x4"]  # compiling for the older one takes as long again
RATES = {"v3:2x2": (61.5e12, 450e9, 164e9), "v5e:2x4": (197e12, 819e9, 200e9)}  # of a device: FLOP/s, HBM, links

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")


def abstract(
    slice_: str = "v3:2x2", spec: Spec | None = None, mesh: str | None = None, fsdp: bool = False
) -> AbstractModel:
    return AbstractModel(SMALL, spec or dense_spec(SMALL), Layout(mesh_of(topology(slice_), mesh), fsdp))


def count(config: Architecture) -> tuple[int, int]:
    """Entries of a dense model's weights, and how many arrays they are."""
    width, ffn, embed = config.hidden_size, config.ffn_dim, config.embed_dim
    layer = 4 * (width + 1) * width + (width + 1) * ffn + (ffn + 1) * width + 4 * width
    table = config.vocab_size * embed + (config.max_positions + 2) * width
    return config.num_layers * layer + table + 2 * width, 16 * config.num_layers + 4


def assert_arguments(record: Record, expected: int, arrays: int) -> None:
    """The compiler's bytes of the arguments are theirs, but for the padding of each to whole tiles of 8 x 128."""
    found = record["hbm"]["arguments"]
    assert expected <= found <= expected + arrays * 8 * 128 * 4
    assert found < 1.05 * expected


@needs_libtpu
@pytest.mark.parametrize("slice_", SLICES)
def test_an_update_of_distillation(slice_: str) -> None:
    record = measure(Job("distil", batch=64, seq=64, accumulation=4), abstract(slice_))
    entries, arrays = count(SMALL)
    # Master, two moments and the float16 teacher; a device holds 8 of 64 rows: tokens and mask, and one target each.
    rows = 8 * (64 * (4 + 1) + 3 * 4)
    assert_arguments(record, entries * (3 * 4 + 2) + rows, 4 * arrays + 5)
    assert record["hbm_limit"] / GIB == pytest.approx(LIMITS[slice_], abs=0.005)
    assert record["hbm"]["aliased"] == pytest.approx(entries * 12, rel=0.05)  # the state is donated
    # Student forward and backward, teacher forward: 2 (1 + 2 + 1) operations a weight and token, of which a device has
    # 8 rows of 64; as many a pair of tokens, for scores and for values; one target a row. Sums and the update are few.
    pairs = 2 * 64 * 64 * SMALL.hidden_size
    products = 8 * 8 * (64 * LAYER_WEIGHTS + pairs + SMALL.vocab_size * SMALL.embed_dim)
    assert products < record["flops"] < 1.06 * products
    # Every gradient crosses the wire at least once.
    assert record["collective_bytes"] >= entries * 4
    assert record["open_loops"] == 0
    assert record["roofline"]["ms"] == max(
        1e3 * record[name] / rate
        for name, rate in zip(("flops", "hbm_bytes", "sent_bytes"), RATES[slice_], strict=True)
    )
    assert "update, bound by" in table_text(record)


@needs_libtpu
@pytest.mark.parametrize("slice_", SLICES)
def test_a_token_of_decoding(slice_: str) -> None:
    dense = measure(Job("decode", 256, 256), abstract(slice_))
    compressed = measure(Job("decode", 256, 256), abstract(slice_, spec_of(SMALL, None, "qkv", 0.5, "int8")))
    entries, arrays = count(SMALL)
    cached = 256 * 32 * bytes_per_token(dense_spec(SMALL))  # a device holds 32 of 256 sequences
    assert_arguments(dense, entries * 2 + cached + 32 * 256 * 5, 2 * arrays)
    for record in (dense, compressed):
        assert (record["unit"], record["open_loops"]) == ("token", 0)
        # The state is donated: the new cache lies where the old one was.
        assert record["hbm"]["aliased"] >= 256 * 32 * record["kv_bytes_per_token"]
    for hbm in (dense["hbm"], compressed["hbm"]):
        assert hbm["arguments"] <= hbm["at_most"] <= hbm["arguments"] + hbm["temporaries"] + 2**20
    # There is no second cache in another layout, where heads of 64 are padded to 128; of the keys or the values of one
    # layer there may be while they are written, and the model has one layer.
    assert dense["hbm"]["temporaries"] < 1.5 * cached
    assert compressed["hbm"]["at_most"] < dense["hbm"]["at_most"]
    # FLOPs of a token: two a weight, and a column for scores and for values; sums and choosing the token are few.
    columns = 2 * 256 * SMALL.hidden_size
    products = 2 * 32 * (LAYER_WEIGHTS + columns + SMALL.vocab_size * SMALL.embed_dim)
    assert products < dense["flops"] < 1.07 * products


@needs_libtpu
@pytest.mark.parametrize("storage", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_the_kernel_of_decoding_reads_the_cache_where_it_lies(storage: str) -> None:
    """A kernel reads and one writes each array, and a token moves the cache once (read), the weights, and little else:
    no copy is made.

    The cache is larger than fast memory, where the compiler otherwise takes it whole.
    """
    job = Job("decode", 2048, 256, attention="pallas")
    program = lower(job, abstract("v5e:2x4", dense_spec(SMALL, storage), "1x1")).compile().as_text()
    arrays = 4 if storage == "int8" else 2
    assert program.count('custom_call_target="tpu_custom_call"') == SMALL.num_layers * (1 + arrays)
    cached = cache_bytes(dense_spec(SMALL, storage), 2048, 256)
    entries, _ = count(SMALL)
    moved = program_cost(program, per_iteration=True).hbm_bytes
    assert cached + 2 * entries < moved < 1.1 * (cached + 2 * entries)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("storage", ["k3v2", "int4"])
def test_blocks_of_few_bits_are_read_as_they_are_stored(storage: str) -> None:
    """One kernel a layer, and no second cache, expanded or packed; XLA would expand it to several times its size."""
    config = replace(SMALL, num_heads=2, max_positions=2048)  # heads of 128 dimensions, which fill the lanes
    model = AbstractModel(config, dense_spec(config, storage), Layout(mesh_of(topology("v5e:2x4"), "1x1")))
    program = lower(Job("decode", 64, 2048, attention="pallas"), model).compile()
    text, cached = program.as_text(), cache_bytes(model.spec, 64, 2048)
    assert text.count('custom_call_target="tpu_custom_call"') == 3 * SMALL.num_layers  # and two that write
    assert program.memory_analysis().temp_size_in_bytes < cached / 4
    assert not re.search(r"(f32|bf16)\[64,2,(2048|32,64|64,32),128\]", text)


@pytest.mark.slow
@needs_libtpu
def test_the_kernel_of_prompts_leaves_no_scores_in_memory() -> None:
    """One kernel a layer but the last, which attends for the newest token alone; all pairs' scores never are in HBM."""
    config = replace(SMALL, num_layers=2, max_positions=512)
    small = AbstractModel(config, spec_of(config, None, "qk", 0.5, "int8"), Layout(mesh_of(topology("v5e:2x4"), "1x1")))
    plain, kernel = (
        lower(Job("prefill", 128, 512, attention=attention), small).compile() for attention in ("xla", "pallas")
    )
    assert kernel.as_text().count('custom_call_target="tpu_custom_call"') == 1
    scores = 128 * 2 * 512 * 512 * 4  # of both clusters, float32: more than fast memory
    moved = [program_cost(program.as_text()).hbm_bytes for program in (plain, kernel)]
    assert moved[1] < moved[0] - scores
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (plain, kernel)]
    assert sizes[1] < sizes[0]


@needs_libtpu
def test_xla_counts_a_loop_once_and_fast_memory_too() -> None:
    """Why there is an account of our own: where this fails, XLA's may have become good enough (`chai_jax.aot.cost`)."""
    side = NamedSharding(mesh_of(topology("v5e:2x4"), "1x1"), PartitionSpec())
    matrix = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=side)
    stack = jax.ShapeDtypeStruct((16, 256, 256), jnp.bfloat16, sharding=side)

    def chain(x: Any, weights: Any) -> Any:
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    program = jax.jit(chain).lower(matrix, stack).compile()
    xla, ours = program.cost_analysis(), program_cost(program.as_text())
    product, nbytes = 2 * 256**3, 2 * 256**2
    assert product <= xla["flops"] < 2 * product
    assert 16 * product <= ours.flops < 17 * product
    assert ours.hbm_bytes == pytest.approx((1 + 16 + 1) * nbytes, rel=0.01)  # in, weights, out; the rest stays in VMEM
    assert not any("collective" in name or "all-" in name for name in xla)


@needs_libtpu
@pytest.mark.parametrize(
    ("slice_", "mesh", "reason"), [("v3:2x2", "1x1", "no kernel for TPU v3"), ("v5e:2x4", None, "not for 8")]
)
def test_devices_that_cannot_have_the_kernel(slice_: str, mesh: str | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        lower(Job("decode", 8, 64, attention="pallas"), abstract(slice_, mesh=mesh))


LEAN = Job("distil", 8, 16, accumulation=1, cached=True, moments="bfloat16", remat=True)
OTHERS = Job("prefill", 8, 64), Job("score", 8, 64), Job("target", 8, 16, accumulation=1)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("job", [LEAN, *OTHERS], ids=lambda job: job.kind)
def test_the_other_jobs_compile_on_a_mesh_with_sharded_weights(job: Job) -> None:
    record = measure(job, abstract(mesh="2x4", fsdp=True))
    entries, _ = count(SMALL)
    assert record["fits"]
    layers = entries - SMALL.vocab_size * SMALL.embed_dim - (SMALL.max_positions + 4) * SMALL.hidden_size
    # Weights; masters and moments of the one layer; masters and smaller moments of all, and no teacher.
    whole = {"target": 2 * entries + 10 * layers, "distil": 10 * entries}.get(job.kind, 2 * entries)
    # All but a few weights are split over all eight devices, those over two or four.
    assert whole / 8 < record["hbm"]["arguments"] < 1.2 * whole / 8


@pytest.mark.slow
@needs_libtpu
def test_too_large_a_job_is_reported_with_what_is_missing() -> None:
    record = measure(Job("decode", batch=2**19, seq=256), abstract())
    assert not record["fits"]
    cache = 2**19 // 8 * 256 * record["kv_bytes_per_token"]
    assert record["hbm_needed"] > max(record["hbm_limit"], cache)
    short = (record["hbm_needed"] - record["hbm_limit"]) / GIB
    assert f"{short:.2f} GiB too much" in table_text(record)


@needs_libtpu
def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", **config_fields(SMALL)}))
    assert main(["aot", str(tmp_path), "--job", "decode", "--batch", "8", "--seq", "64", "--mesh", "4x2"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["topology"], record["mesh_shape"], record["fits"]) == ("v3:2x2", {"data": 4, "model": 2}, True)


def table_text(record: Record) -> str:
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as captured:
        console.print(report(record))
    return captured.get()


@pytest.mark.parametrize("name", ["batch", "seq", "targets", "accumulation"])
@pytest.mark.parametrize("value", [0, -8, 2**70])
def test_sizes_below_one(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}; expected at least 1"):
        Job("decode", **{"batch": 8, "seq": 64, name: value})


def test_more_targets_than_tokens() -> None:
    with pytest.raises(InputError, match="targets is 65; expected at most the 64 tokens"):
        Job("distil", 8, 64, targets=65)


@needs_libtpu
@pytest.mark.parametrize("name", ["nonsense", "v9:2x2", "v3:3x3"])
def test_an_unknown_topology(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["aot", "facebook/opt-125m", "--topology", name]) == 2
    assert f"no topology '{name}'" in capsys.readouterr().err


@needs_libtpu
def test_a_mesh_of_other_devices() -> None:
    with pytest.raises(InputError, match="'3x2' is not one of 8 devices"):
        mesh_of(topology("v3:2x2"), "3x2")


@pytest.mark.parametrize("shape", ["", "x", "8", "8x", "-8x1", "8x1x1", "9" * 5000 + "x1", "8 1"])
def test_meshes_that_cannot_be(shape: str) -> None:
    with pytest.raises(InputError, match="is not one of 8 devices; expected DATAxMODEL, such as 4x2"):
        mesh_of(tuple(jax.devices()), shape)
    assert dict(mesh_of(tuple(jax.devices()), "2x4").shape) == {"data": 2, "model": 4}


@needs_libtpu
def test_jobs_that_cannot_be() -> None:
    with pytest.raises(InputError, match="256 positions"):
        lower(Job("prefill", 8, 512), abstract())
    with pytest.raises(InputError, match="batch of 12 does not divide over 8"):
        lower(Job("decode", 12, 64), abstract())


def test_no_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'chai_jax\[tpu\]'"):
        topology("v3:2x2")


def test_configs(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="no folder"):
        architecture_of("facebook/opt-66b")
    shape = PUBLISHED["facebook/opt-350m"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", **config_fields(shape)}))
    assert architecture_of(str(tmp_path)) == shape


@pytest.mark.parametrize("model", ["gpt2", "Llama-3.2-1B", "opt-125m"])
def test_owners_may_be_left_out(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name goes first."""
    (whole,) = [name for name in PUBLISHED if name.endswith(f"/{model}")]
    assert architecture_of(model) is PUBLISHED[whole]
    monkeypatch.chdir(tmp_path)
    (tmp_path / model).mkdir()
    assert architecture_of(model) is PUBLISHED[whole]
    (tmp_path / model / "config.json").write_text(json.dumps({"model_type": "opt", **config_fields(SMALL)}))
    assert architecture_of(model) == SMALL


@pytest.mark.parametrize(("model", "near"), [("facebook/opt-66b", "opt-"), ("Llama-3-8B", "Llama-3."), ("x" * 200, "")])
def test_another_shape_is_told_a_near_one(model: str, near: str) -> None:
    with pytest.raises(InputError, match=f"is no folder with a config.json; expected one, or .* such as .*/.*{near}"):
        architecture_of(model)


def test_help_lists_every_published_shape() -> None:
    text = help_of(AotCommand)["model"]
    listed = re.findall(r"[\w.-]+\d[\w.-]*", text.partition(":")[2])
    assert sorted(listed) == sorted(name.rpartition("/")[2] for name in PUBLISHED)


# As transformers counts them (`num_parameters()`, a tied head once), and as the models' cards say.
MILLIONS = {
    "facebook/opt-125m": 125.239,
    "facebook/opt-350m": 331.196,
    "facebook/opt-1.3b": 1315.758,
    "facebook/opt-6.7b": 6658.474,
    "openai-community/gpt2": 124.440,
    "openai-community/gpt2-xl": 1557.611,
    "EleutherAI/pythia-160m": 162.323,
    "EleutherAI/pythia-1.4b": 1414.648,
    "HuggingFaceTB/SmolLM2-135M": 134.515,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1100.048,
    "meta-llama/Llama-2-7b-hf": 6738.416,
    "meta-llama/Llama-3.2-1B": 1235.814,
    "meta-llama/Llama-3.1-8B": 8030.261,
    "mistralai/Mistral-7B-v0.1": 7241.732,
    "mistralai/Mistral-7B-v0.3": 7248.024,
    "Qwen/Qwen2.5-0.5B": 494.033,
    "Qwen/Qwen2.5-7B": 7615.617,
    "Qwen/Qwen3-0.6B": 596.050,
    "microsoft/Phi-3-mini-4k-instruct": 3821.080,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_known_models_have_as_many_weights_as_published(name: str) -> None:
    config = PUBLISHED[name]
    declared = jax.tree.leaves(declare(config, dense_spec(config)), is_leaf=lambda leaf: hasattr(leaf, "axes"))
    assert sum(math.prod(leaf.shape) for leaf in declared) / 1e6 == pytest.approx(MILLIONS[name], abs=0.0006)


def test_a_uniform_plan_covers_every_head() -> None:
    for clusters, count in ((0.5, 2), (0.75, 3), (0.01, 1), (1.0, 4)):
        plan = uniform_plan(SMALL, "qkv", clusters, "int8")
        assert {len(layer.clusters) for layer in plan.layers} == {count}
    with pytest.raises(InputError, match="clusters is 0"):
        uniform_plan(SMALL, "qkv", 0.0, "int8")


@pytest.mark.parametrize(("peak", "limit", "expected"), [(9, 20, 9), (13, 20, 12), (13, 11, 11)])
def test_what_a_program_needs_is_the_least_that_is_known(peak: int, limit: int, expected: int) -> None:
    """Arguments, outputs and temporaries sum to 12: less where they share space, where fast memory is counted in, or
    where the compiler has less and accepts the program."""
    sizes = {"argument": 6, "output": 4, "temp": 5, "alias": 3, "generated_code": 1}
    account = SimpleNamespace(peak_memory_in_bytes=peak, **{f"{name}_size_in_bytes": n for name, n in sizes.items()})
    assert _hbm(account, limit)["at_most"] == expected


def fake(needs: Callable[[int], int], limit: int, tried: list[int]) -> Callable[[int], Record]:
    def try_batch(batch: int) -> Record:
        tried.append(batch)
        fits = needs(batch) <= limit
        return {"fits": fits, "hbm_limit": limit, "hbm": {"at_most": needs(batch)}, "hbm_needed": needs(batch)}

    return try_batch


@pytest.mark.parametrize("first", [8, 64, 4096])
@pytest.mark.parametrize("limit", [1_000, 1_007, 1_008, 50_000])
def test_the_search_ends_at_the_last_batch_that_fits(first: int, limit: int) -> None:
    tried: list[int] = []
    found = largest_batch(fake(lambda batch: 100 + batch, limit, tried), 8, first, tell=lambda _: None)
    best = (limit - 100) // 8 * 8
    if limit < 2_000:
        assert (found["largest"], found["too_large"]) == (best, best + 8)
    assert found["largest"] <= best < found["too_large"] <= 1.01 * found["largest"]
    assert found["fitting"]["fits"]
    assert not found["failing"]["fits"]
    assert len(tried) == found["compiled"] <= 8


def test_the_search_bends_with_the_compiler_and_keeps_to_its_bound() -> None:
    def bent(batch: int) -> int:  # near the limit the compiler trades time for memory
        return 2 * batch if batch < 400 else 800 + (batch - 400) // 2

    tried: list[int] = []
    found = largest_batch(fake(bent, 1000, tried), 8, 8, tell=lambda _: None)
    assert found["largest"] <= 800 < found["too_large"] == found["largest"] + 8
    tried.clear()
    found = largest_batch(fake(bent, 1000, tried), 8, 8, most=3, tell=lambda _: None)
    assert len(tried) == 3
    assert found["fitting"]["fits"]


def test_the_search_says_when_nothing_fits() -> None:
    found = largest_batch(fake(lambda batch: 100 + batch, 50, []), 8, 64, tell=lambda _: None)
    assert (found["largest"], found["fitting"]) == (0, None)
    assert not found["failing"]["fits"]
