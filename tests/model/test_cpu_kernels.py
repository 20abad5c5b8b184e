"""The kernels of CPUs: attention, when they are used, and what they may change in numbers.

More of their attention is tested beside that of the accelerators (test_decode_kernel.py).
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.adapt.finetune import completion_loss, training_execution
from chai_jax.adapt.updates import Batch
from chai_jax.config import TrainConfig
from chai_jax.errors import InputError
from chai_jax.model import kernels
from chai_jax.model.attention import attend, attend_one
from chai_jax.model.cache import empty, store
from chai_jax.model.decoder import block, forward, unembed
from chai_jax.model.execution import Execution
from chai_jax.model.kernels import cpu
from chai_jax.model.model import Model
from chai_jax.model.params import Params, fold_projections, init
from chai_jax.model.place import locate
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.planned import planned_spec, uniform_plan
from chai_jax.plans.spec import Group, LayerSpec, Spec
from chai_jax.serve import decode as serve

pytestmark = [
    pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler"),
    pytest.mark.usefixtures("small_matrices"),
]
Normal = Callable[..., jax.Array]
CONFIG = Architecture(64, 32, 2, 4, 64, 64, 32)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("rank", [64, 40])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_attention_over_a_cache_of_usual_and_of_other_ranks(normal: Normal, storage: str, rank: int) -> None:
    """The rank that the kernel is compiled for, and one whose last entries fill no vector."""
    query = normal(2, 3, 1, 1, rank)
    keys, values = (store(normal(2, heads, 45, rank), storage) for heads in (3, 6))
    allowed = jnp.ones((2, 1, 45), bool).at[0, 0, :7].set(False).at[1, 0, 20:].set(False)
    rest = {"scale": rank**-0.5, "value_heads": 2}
    expected = jax.jit(partial(attend, **rest))(query, keys, values, allowed)[0]
    run = jax.jit(partial(attend_one, **rest, kernels="native"))
    assert "chai_jax_attention" in str(run.trace(query, keys, values, allowed).jaxpr)
    np.testing.assert_allclose(run(query, keys, values, allowed), expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.usefixtures("native")
def test_columns_that_no_token_uses_are_not_read(normal: Normal) -> None:
    query, keys = normal(2, 1, 1, 1, 16), normal(2, 1, 24, 16)
    allowed = jnp.zeros((2, 1, 24), bool).at[0, 0, 3:9].set(True).at[1, 0, 20:].set(True)
    spoiled = jnp.where(allowed[:, :, :, None], keys, jnp.nan)
    run = jax.jit(partial(attend_one, scale=0.3, value_heads=1, kernels="native"))
    found = run(query, spoiled, spoiled, allowed)
    assert bool(jnp.isfinite(found).all())
    np.testing.assert_array_equal(found, run(query, keys, keys, allowed))


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_decoding_by_kernels_makes_the_same_tokens_in_place(native: Execution, storage: str) -> None:
    """Clusters of one key and several values; the program holds no second cache."""
    group = Group(clusters=2, queries=1, values=2, storage=storage)
    spec = Spec((LayerSpec("qk", ((0, 1), (2, 3)), (group,), 8, 8),) * 2)
    params = fold_projections(init(CONFIG, spec, jax.random.key(0), std=0.3))
    tokens, mask = serve.pad_right([[2, 9, 4], [2, 5]], 1)
    keys, rule = jax.random.split(jax.random.key(0), 2), (serve.Sampling.checked(), jnp.int32(serve.NEVER))

    def completed(how: Execution) -> tuple[np.ndarray, str]:
        state = serve.prefill(CONFIG, spec, params, tokens, mask, keys, *rule, capacity=64, how=how)
        lowered = serve.decode.lower(CONFIG, spec, params, state, jnp.int32(40), *rule, how=how)
        program = lowered.compile()
        assert program.memory_analysis().alias_size_in_bytes >= state.cache.nbytes
        return np.asarray(program(params, state, jnp.int32(40), *rule).tokens), lowered.as_text()

    (found, program), (expected, plain) = completed(native), completed(native.replace(kernels="xla"))
    np.testing.assert_array_equal(found, expected)
    names = "chai_jax_attention", "chai_jax_few_rows"
    assert all(name in program and name not in plain for name in names)
    assert set(names) < set(cpu.TARGETS)


def decoded(config: Architecture, spec: Spec, params: Params, how: Execution) -> np.ndarray:
    """The logits of 24 tokens of two sequences, read one by one."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 60, (24, 2, 1)), jnp.int32)

    def step(cache, token):  # type: ignore[no-untyped-def]
        out = forward(config, spec, params, token, jnp.ones_like(token, bool), how, cache=cache)
        return out.cache, unembed(config, params, out.hidden[:, -1], how)

    return np.asarray(jax.jit(lambda tokens: jax.lax.scan(step, empty(spec, 2, 24), tokens)[1])(tokens))


LLAMA = dataclasses.replace(
    CONFIG, num_heads=6, num_kv_heads=2, head_size=8, norm="rms", gated=True, bias=False, activation="silu",
    rotary=Rotary(), position_offset=0, windows=(0, 9), family="llama",
)  # fmt: skip
PYTHIA = dataclasses.replace(
    CONFIG, parallel=True, activation="gelu", rotary=Rotary(fraction=0.25), position_offset=0, family="gpt_neox"
)


@pytest.mark.parametrize("share", ["dense", "qk", "qkv"])
@pytest.mark.parametrize("config", [LLAMA, PYTHIA], ids=["llama", "pythia"])
def test_kernels_read_any_decoder(native: Execution, config: Architecture, share: str) -> None:
    """Several queries of a key, windows, turned queries; also several queries and several values of a key."""
    plan = uniform_plan(config, "qkv" if share == "dense" else share, 1.0 if share == "dense" else 0.5, "float32")
    spec = planned_spec(plan, config)
    assert {layer.share for layer in spec.layers} == {share}
    params = fold_projections(init(config, spec, jax.random.key(0), std=0.3))
    found, expected = (decoded(config, spec, params, how) for how in (native, native.replace(kernels="xla")))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("values", [1, 2])
def test_kernels_change_logits_by_rounding_alone(native: Execution, values: int, storage: str, dtype: str) -> None:
    """In float32 by a few of its last bits. Where something is rounded to fewer bits, as what is computed in bfloat16
    and what is stored in less, an entry may be rounded the other way: by a few bits of that."""
    group = Group(clusters=4 // values, queries=1, values=values, storage=storage)
    heads = ((0, 1), (2, 3)) if values == 2 else ((0,), (1,), (2,), (3,))
    spec = Spec((LayerSpec("qk", heads, (group,), 8, 8),) * 2)
    native = native.replace(dtype=jnp.dtype(dtype))
    params = serve.cast(fold_projections(init(CONFIG, spec, jax.random.key(0), std=0.3)), native)
    found, expected = (decoded(CONFIG, spec, params, how) for how in (native, native.replace(kernels="xla")))
    most = 3e-6 if (storage, dtype) == ("float32", "float32") else 0.03
    np.testing.assert_allclose(found, expected, rtol=0, atol=most * np.abs(expected).max())


@pytest.mark.slow
def test_greedy_text_is_the_same_with_and_without_a_compiler(small_model: Path) -> None:
    """Of one device, as a laptop is one, in float32."""
    command = [sys.executable, "-m", "chai_jax.cli", "generate", str(small_model), "--prompt", "a small model"]
    set_here = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def text(**variables: str) -> str:
        return subprocess.run(command, env=set_here | variables, check=True, capture_output=True, text=True).stdout

    with_kernels = text()
    assert len(with_kernels.split()) > 10
    assert text(CXX="no-such-compiler") == with_kernels


def test_one_cpu_uses_its_kernels_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    here = jax.devices("cpu")[:1]
    assert kernels.choose_kernels("auto", here) == "native"
    assert kernels.choose_kernels("auto", jax.devices("cpu")) == "xla"
    eight = jax.devices("cpu")
    assert Execution.choose().kernels == "xla"
    monkeypatch.setattr(jax, "devices", lambda: here)
    assert Execution.choose().kernels == "native"
    assert Execution.choose(kernels="xla").kernels == "xla"
    with pytest.raises(InputError, match="native is for one CPU, not for 8 x cpu; expected auto or xla"):
        kernels.check("native", eight)


def test_what_is_looked_at_is_attended_to_by_xla(native: Execution) -> None:
    """It has scores to show; its products are kernels all the same."""
    (layer,) = Spec.dense(1, 4, 8).layers
    params = init(CONFIG, Spec((layer,)), jax.random.key(0))["layers"]["0"]
    cache = empty(Spec((layer,)), 1, 4)
    place = locate(jnp.ones((1, 1), bool), cache)

    def ran(plain: bool) -> tuple[bool, bool]:
        run = partial(block, CONFIG, layer, params, place=place, past=cache.layers[0], how=native, plain=plain)
        text = str(jax.make_jaxpr(lambda x: run(x)[0])(jnp.ones((1, 1, 32))))
        return "chai_jax_attention" in text, "chai_jax_few_rows" in text

    assert ran(plain=False) == (True, True)
    assert ran(plain=True) == (False, True)


def test_what_trains_has_no_kernels(native: Execution) -> None:
    """Whose gradients nobody compared."""
    spec = Spec.dense(2, 4, 8)
    params = init(CONFIG, spec, jax.random.key(0))
    ones = jnp.ones((1, 2), jnp.int32)
    batch = Batch(ones, ones == 1, ones - 1, ones, jnp.ones((1, 2)))

    def traced(how: Execution) -> str:
        return str(jax.make_jaxpr(partial(completion_loss, CONFIG, spec, how))(params, batch))

    assert "ffi_call" in traced(native)
    assert "ffi_call" not in traced(training_execution(Model(CONFIG, spec, params, execution=native), TrainConfig()))
