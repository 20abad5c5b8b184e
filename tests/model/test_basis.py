"""Keys in a basis, and values foretold from keys: what is stored, what is read, and that all passes agree."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from chai_jax.adapt.step import everything
from chai_jax.aot.programs import spec_of
from chai_jax.compress.basis_stream import BasisStream, basis_plan
from chai_jax.compress.cluster import cluster
from chai_jax.compress.key_basis import KeyBasis, in_one_program
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.errors import InputError
from chai_jax.model.cache import bytes_per_token, cache_bytes, empty, remember
from chai_jax.model.channel_bits import quantize_channels, read_channels
from chai_jax.model.decoder import forward
from chai_jax.model.execution import Execution
from chai_jax.model.few_bits import SCALES
from chai_jax.model.layerwise import through_layer
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.planned import planned_spec
from chai_jax.plans.spec import Spec

LLAMA = Architecture(
    67,
    64,
    2,
    4,
    48,
    256,
    64,
    activation="silu",
    norm="rms",
    gated=True,
    position_offset=0,
    num_kv_heads=2,
    bias=False,
    rotary=Rotary(),
    family="llama",
)
SHAPES = {
    "llama": LLAMA,
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, family="qwen3"),
    "gpt_neox": dataclasses.replace(
        LLAMA, norm="layer", gated=False, num_kv_heads=None, rotary=Rotary(fraction=0.5), family="gpt_neox", tied=False
    ),
    "opt": Architecture(67, 64, 2, 4, 48, 256, 64),
}
OTHERS, SLOW = ("qwen3", "gpt_neox", "opt"), pytest.mark.slow
ROWS = np.random.default_rng(0).integers(3, 60, (4, 200)).astype(np.int32)
compiled = jax.jit(partial(forward, how=Execution.choose("float32")), static_argnums=(0, 1), static_argnames="how")


@dataclasses.dataclass(frozen=True)
class Windows:
    tokens: np.ndarray
    mask: np.ndarray


TEXT = Windows(ROWS, np.ones(ROWS.shape, bool))


@cache
def dense(name: str) -> Model:
    """A random model, attention far from uniform."""
    config = SHAPES[name]
    spec = Spec.of(config)
    return Model(config, spec, init(config, spec, jax.random.key(1), 0.2))


@cache
def in_basis(name: str, bits: float = 2.4, storage: str = "basis3") -> Model:
    model = dense(name)
    return quantize(model, basis_plan(model, TEXT, bits, storage), TEXT)


def test_channels_have_their_own_bits() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 64, 7)).astype(np.float32) * np.logspace(-2, 1, 7, dtype=np.float32)
    parts = ((6, 1), (3, 4), (2, 2))
    stored = quantize_channels(jnp.asarray(x), parts)
    assert stored.nbytes == 2 * 3 * (64 // 8 * (6 + 3 * 4 + 2 * 2) + 7 * 3)
    read = np.asarray(read_channels(stored))
    for channel, bits in enumerate(np.repeat(*np.asarray(parts).T)):
        for block in np.ndindex(2, 3):
            column = x[(*block, slice(None), channel)].astype(np.float64)
            low = float(np.asarray(column.min(), ml_dtypes.bfloat16))
            low = (
                low
                if low <= column.min()
                else float(np.nextafter(ml_dtypes.bfloat16(low), ml_dtypes.bfloat16(-np.inf)))
            )
            scale = SCALES[(column.max() - low) / (2**bits - 1) <= SCALES][0]
            expected = low + scale * np.clip(np.round((column - low) / scale), 0, 2**bits - 1)
            np.testing.assert_allclose(read[(*block, slice(None), channel)], expected, atol=scale * 1e-3)


def naive(x: np.ndarray, sinks: int, block: int) -> np.ndarray:
    """Which columns are read from few bits, of a text that goes on: those of whole blocks, but for the first."""
    columns = np.arange(len(x))
    return (columns >= sinks) & (columns < len(x) // block * block)


@pytest.mark.parametrize("name", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_what_is_read_of_keys_and_values(name: str) -> None:
    """By the formulas of `chai_jax.model.basis`, one token after the other."""
    model = in_basis(name)
    layer, params = model.spec.layers[1], model.params["layers"]["1"]["basis"]
    heads, rank = layer.key_heads, layer.key_rank
    generator = np.random.default_rng(2)
    key, value = (generator.normal(size=(1, heads, 150, rank)).astype(np.float32) for _ in range(2))
    args = jnp.asarray(key), jnp.asarray(value), "basis3", jnp.int32(0), jnp.ones((1, 150), bool)
    stored, keys, values = remember(None, *args, None, layer.channels, params)
    coordinates = np.asarray(read_channels(stored.keys.blocks), np.float64)
    assert coordinates.shape == (1, heads, 2, 64, sum(count for _, count in layer.channels))
    few = naive(key[0, 0], 4, 64)
    for head in range(heads):
        mean, back, told, offset = (
            np.asarray(params[part][head], np.float64) for part in ("mean", "back", "values", "offset")
        )
        known = coordinates[0, head].reshape(128, -1)
        where = few[:128]
        np.testing.assert_allclose(keys.old[0, head, :128][where], (mean + known @ back)[where], atol=1e-4)
        whole = key[0, head].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(keys.recent[0, head, 128:], whole[128:])
        np.testing.assert_array_equal(keys.old[0, head, :4], whole[:4])
        # Of values what is left to store is small where keys foretell it; what is read is nearly the value.
        rest = value[0, head, :128] - (offset + known @ told)
        read = np.asarray(values.old[0, head, :128]) - (offset + known @ told)
        error = np.linalg.norm((read - rest)[where], axis=1) / np.linalg.norm(rest[where], axis=1)
        assert error.max() < 0.4
        assert 0.1 < error.mean() < 0.25  # three bits of a normal distribution: 0.19


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in OTHERS else ()) for name in SHAPES])
def test_decoding_reads_what_prefill_reads(name: str) -> None:
    model = in_basis(name)
    tokens = jnp.asarray(ROWS[:3, :150])
    mask = np.ones((3, 150), bool)
    mask[1, :30] = mask[2, 70:75] = False
    whole = compiled(model.config, model.spec, model.params, tokens, jnp.asarray(mask)).hidden
    cache = empty(model.spec, 3, 150)
    parts = []
    for first, last in ((0, 40), (40, 120), *((at, at + 1) for at in range(120, 150))):
        part = compiled(
            model.config, model.spec, model.params, tokens[:, first:last], jnp.asarray(mask[:, first:last]), cache=cache
        )
        cache = part.cache
        parts.append(part.hidden)
    found = np.concatenate(parts, axis=1)
    # The passes add up in other orders; where that tips a number to the next level, a step of it is seen.
    difference = np.abs(found - np.asarray(whole))[mask]
    assert np.mean(difference < 2e-4) > 0.999
    assert difference.max() < 5e-3


def test_a_text_shorter_than_a_block_is_stored_whole() -> None:
    tokens = jnp.asarray(ROWS[:2, :20])
    found, expected = in_basis("llama")(tokens), with_storage(dense("llama"), "bfloat16")(tokens)
    # In bfloat16 both, but keys before their rotation here and after it there.
    assert float(jnp.abs(found - expected).max()) < 0.02 * float(jnp.abs(expected).max())


@pytest.mark.parametrize("storage", ["basis4", "basis2"])
def test_bytes(storage: str) -> None:
    model = in_basis("llama", 3.0, storage)
    assert empty(model.spec, 2, 200).nbytes == cache_bytes(model.spec, 2, 200)
    one, two = (empty(model.spec, 1, columns).nbytes for columns in (128, 192))
    assert (two - one) / 64 == bytes_per_token(model.spec)
    assert planned_spec(model.plan, model.config) == model.spec
    for layer in model.spec.layers:
        channels = sum(bits * 64 / 8 + 3 for bits, count in layer.channels for _ in range(count)) / 64
        assert channels * 8 <= 3.0 * layer.key_rank  # the bits that were asked for
        assert bytes_per_token(Spec((layer,))) == 2 * (channels + int(storage[-1]) * layer.value_rank / 8 + 2)


def test_channels_go_where_they_pay() -> None:
    """Of all choices with as many bits none has less error: tried one by one."""
    error = np.asarray(
        [[9.0, 4.0, 1.0], [1.0, 0.5, 0.1], [0.25, 0.12, 0.03], [0.06, 0.03, 0.01], [0.02] * 3, [0.01] * 3]
    )
    basis = KeyBasis(np.zeros((1, 3)), np.eye(3)[None], np.eye(3)[None], error)
    bits = np.asarray([0, 2, 3, 4, 5, 6])
    sizes = np.where(bits, bits + 3 / 8, 0)
    everything = np.stack(np.meshgrid(*[np.arange(6)] * 3), -1).reshape(-1, 3)
    for budget in (1.2, 2.0, 3.3, 5.0):
        channels = basis.channels(budget)
        chosen = sorted((each for each, count in channels for _ in range(count)), reverse=True)
        mine = sum(sizes[bits == each][0] for each in chosen)
        assert mine <= 3 * budget
        picks = np.pad([np.flatnonzero(bits == each)[0] for each in chosen], (0, 3 - len(chosen)))
        ours = error[picks, range(3)].sum()
        # A convex list of bits is spent greedily: no choice that takes no more bits than ours is better.
        within = sizes[everything].sum(axis=1) <= mine
        assert ours <= error[everything, range(3)].sum(axis=1)[within].min() + 1e-12


@pytest.mark.slow
def test_a_basis_with_all_its_bits_changes_little() -> None:
    tokens = jnp.asarray(ROWS[:2, :150])
    logits = dense("llama")(tokens)
    errors = [
        float(jnp.mean((in_basis("llama", bits, storage)(tokens) - logits) ** 2))
        for bits, storage in ((6.3, "basis4"), (3.0, "basis4"), (1.5, "basis2"))
    ]
    assert errors[0] < errors[1] < errors[2]
    plain = float(jnp.mean((with_storage(dense("llama"), "k3v3")(tokens) - logits) ** 2))
    assert float(jnp.mean((in_basis("llama", 3.3, "basis3")(tokens) - logits) ** 2)) < plain


def test_all_channels_can_be_tried_in_one_program() -> None:
    model = dense("llama")
    stream = BasisStream(model, TEXT)
    channels = stream.basis.channels(2.4)
    basis = stream.params(channels)
    padded, params = in_one_program(basis, channels, model.config.head_dim)
    layer, old = model.spec.layers[0], model.params["layers"]["0"]
    outputs = [
        through_layer(
            model, layer.stored_as(["basis3"] * 2, kind), {**old, "basis": values}, stream.x, np.asarray(stream.mask)
        )
        for kind, values in ((channels, basis), (padded, params))
    ]
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_training_leaves_a_basis_alone() -> None:
    marks = everything(in_basis("llama").params)["layers"]["0"]
    assert marks["key"]["kernel"]
    assert not any(jax.tree.leaves(marks["basis"]))


def test_the_gradient_passes_straight_through() -> None:
    model = in_basis("llama")
    tokens, mask = jnp.asarray(ROWS[:1, :140]), jnp.ones((1, 140), bool)

    def loss(params: dict) -> jax.Array:
        return jnp.sum(compiled(model.config, model.spec, params, tokens, mask).hidden[..., :3] ** 2)

    found = jax.grad(loss)(model.params)["layers"]["0"]
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(found["basis"]))
    assert all(float(jnp.abs(found[name]["kernel"]).max()) > 0 for name in ("query", "key", "value"))


def test_what_cannot_be() -> None:
    model = dense("llama")
    with pytest.raises(InputError, match="fitted to text: make a plan"):
        with_storage(model, "basis3")
    plan = basis_plan(model, TEXT, 2.4, "basis3")
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(InputError, match="expected calibration text"):
        quantize(model, plan)
    with pytest.raises(InputError, match="at least 128"):
        basis_plan(model, Windows(ROWS[:1, :100], np.ones((1, 100), bool)), 2.4, "basis3")
    layers = [dataclasses.replace(layer, channels=()) for layer in plan.layers]
    with pytest.raises(InputError, match="has channels"):
        Plan(tuple(layers)).check()
    spec = in_basis("llama").spec
    assert Spec.from_json(spec.to_json()) == spec
    broken = spec.to_json()
    broken["layers"][0]["channels"] = [[6, 40]]
    with pytest.raises(InputError, match="contradicts itself"):
        Spec.from_json(broken)
    with pytest.raises(InputError, match="without a plan; expected one of float32"):
        spec_of(LLAMA, storage="basis3")
    pair = LayerPlan((ClusterPlan((0, 1)),))
    with pytest.raises(InputError, match="quantized already"):
        cluster(in_basis("llama"), Plan((pair, pair)))
    assert with_storage(in_basis("llama"), "int8").params["layers"]["0"].keys() == model.params["layers"]["0"].keys()
