"""The training step: what must not change a result, what may not move, and what the optimizer is."""

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chai_jax.adapt import step as steps
from chai_jax.adapt import train as training
from chai_jax.adapt.finetune import completion_loss, finetune, training_execution
from chai_jax.adapt.target import layer_mask
from chai_jax.adapt.updates import Batch, pack_update
from chai_jax.config import FinetuneConfig, TrainConfig
from chai_jax.data.batches import Encoded
from chai_jax.errors import InputError
from chai_jax.model.flops import count_flops
from chai_jax.model.model import Model
from chai_jax.model.params import declare
from chai_jax.model.quantized import dequantize, is_leaf
from chai_jax.model.sharding import Layout, make_mesh
from chai_jax.score.loglikelihood import loglikelihoods

Build = Callable[..., Model]
SHORT = TrainConfig(lr=1e-3, batch=8, accumulation=2, epochs=3)


def loss_of(model: Model, dtype: str = "float32") -> steps.Loss:
    return partial(completion_loss, model.config, model.spec, training_execution(model, TrainConfig(compute=dtype)))


def gradients(model: Model, batch: Batch, layout: Layout | None = None) -> tuple[Any, Any]:
    params = model.params
    if layout is not None:
        params = layout.params(model.config, model.spec, params)
        batch = layout.join(batch, batch.tokens.shape[1])
    masters, frozen = steps.split(params, steps.everything(params))
    return jax.jit(partial(steps.gradients, loss_of(model)))(masters, frozen, None, batch)


def mean_loss(model: Model, encoded: list[Encoded]) -> float:
    """Cross-entropy in nats per target token, over all targets, as scoring computes it."""
    targets = sum(len(example.tokens) - example.start for example in encoded)
    return -float(loglikelihoods(model, encoded)[:, 0].sum()) / targets


def assert_close(one: Any, other: Any, atol: float = 1e-5) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol, rtol=1e-5), one, other)


def assert_identical(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def whole(tiny: Build, examples: list[Encoded]) -> tuple[Any, Any]:
    """Gradient and means of all sixteen examples in one microbatch on one device; every answer's length differs."""
    return gradients(tiny(), pack_update(examples, (1, 16), 32, 6))


def test_accumulation_changes_nothing(tiny: Build, examples: list[Encoded], whole: tuple[Any, Any]) -> None:
    assert_close(gradients(tiny(), pack_update(examples, (8, 2), 32, 6)), whole)


@pytest.mark.parametrize(("model_axis", "fsdp"), [(1, False), (2, False), (2, True)])
def test_devices_and_empty_rows_change_nothing(
    tiny: Build, examples: list[Encoded], whole: tuple[Any, Any], model_axis: int, fsdp: bool
) -> None:
    layout = Layout(make_mesh(model=model_axis), fsdp)
    found = gradients(tiny(), pack_update(examples, (3, 8), 32, 6), layout)  # eight rows are empty
    assert len(jax.tree.leaves(found)[0].sharding.device_set) == 8
    assert_close(found, whole)


def test_mean_is_over_targets(tiny: Build, examples: list[Encoded], whole: tuple[Any, Any]) -> None:
    np.testing.assert_allclose(whole[1]["loss"], mean_loss(tiny(), examples), atol=1e-5)


@pytest.fixture(scope="module")
def run(tiny: Build, examples: list[Encoded]) -> tuple[Model, Model, Any, list[dict[str, Any]]]:
    """A model, what six updates made of it, its parameters as they were before, and the log."""
    model, log = tiny(), []
    before = jax.tree.map(np.array, model.params)
    return model, finetune(model, examples, FinetuneConfig(SHORT), log.append), before, log


def test_callers_model_stays_usable(run: Any) -> None:
    model, tuned, before, _ = run
    assert_identical(model.params, before)
    tokens = np.array([[2, 5, 6]])
    assert np.isfinite(model(tokens)).all()
    assert not np.array_equal(model(tokens), tuned(tokens))
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), tuned.params, before)
    assert all(jax.tree.leaves(moved))


def test_the_rate_decays_linearly_to_zero(run: Any) -> None:
    *_, log = run
    np.testing.assert_allclose([entry["lr"] for entry in log], 1e-3 * (1 - np.arange(6) / 6), rtol=1e-6)
    assert float(steps.learning_rate(SHORT, 6)(6)) == 0


def test_log_has_one_entry_per_update(run: Any) -> None:
    *_, log = run
    names = {"stage", "step", "steps", "lr", "loss", "grad_norm", "step_s", "tokens_per_s"}
    assert [set(entry) for entry in log] == [names] * 6
    assert [(entry["step"], entry["steps"], entry["stage"]) for entry in log] == [
        (n, 6, "finetune") for n in range(1, 7)
    ]
    assert all(entry["tokens_per_s"] > 0 and entry["grad_norm"] > 0 for entry in log)


def test_speed_is_in_the_log_and_on_the_progress_line(
    tiny: Build, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all updates tokens and FLOPs sum to those of the examples; devices of a known peak also have an MFU."""
    progress = mock.MagicMock()
    progress.__enter__.return_value = progress
    monkeypatch.setattr(training, "bar", lambda: progress)
    monkeypatch.setattr(training, "peak", lambda device: SimpleNamespace(flops=1e9))
    model, log = tiny(layout=Layout(make_mesh(2))), []
    config = FinetuneConfig(dataclasses.replace(SHORT, epochs=1))
    finetune(model, examples, config, log.append)
    seconds = np.array([entry["step_s"] for entry in log])
    tokens = sum(len(example.tokens) - 1 for example in examples)
    np.testing.assert_allclose(seconds @ [entry["tokens_per_s"] for entry in log], tokens)
    flops = count_flops(model.config, model.spec, steps.everything(model.params)).of(examples)
    np.testing.assert_allclose(seconds @ [entry["mfu"] for entry in log], flops / 2e9)
    assert [call.kwargs["note"] for call in progress.update.call_args_list] == [
        f"loss {entry['loss']:.4f}, {entry['tokens_per_s']:,.0f} tokens/s, {entry['step_s']:.2f} s, "
        f"{entry['mfu']:.0%} MFU"
        for entry in log
    ]


def test_same_seed_same_bits(run: Any, tiny: Build, examples: list[Encoded]) -> None:
    *_, first = run
    log: list[dict[str, Any]] = []
    again = finetune(tiny(), examples, FinetuneConfig(SHORT), log.append)
    assert_identical(again.params, run[1].params)
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in first]


def test_devices_see_the_same_examples(run: Any, tiny: Build, examples: list[Encoded]) -> None:
    """The losses of all updates agree; the parameters need not, since AdamW amplifies gradients near zero."""
    *_, first = run
    log: list[dict[str, Any]] = []
    finetune(tiny(layout=Layout(make_mesh())), examples, FinetuneConfig(SHORT), log.append)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([entry[name] for entry in log], [entry[name] for entry in first], rtol=1e-4)


def test_few_programs(tiny: Build) -> None:
    """One trace per shape of batch, however many updates."""
    model, traced = tiny(), []
    examples = [Encoded((5,) * length, length - 1) for length in (4, 9, 12, 20, 25, 30)]

    def loss(params: Any, batch: Batch, extra: Any) -> steps.Sums:
        traced.append(batch.tokens.shape)
        return loss_of(model)(params, batch, extra)

    config = TrainConfig(batch=3, accumulation=1, epochs=4)
    training.train(model, examples, loss, FinetuneConfig(config), stage="test")
    assert sorted(traced) == [(3, 16), (3, 32)]


def test_masters_are_rounded_as_they_will_be_stored(tiny: Build) -> None:
    for model in (tiny(dtype=jnp.bfloat16, int8=(0,)), tiny(dtype=jnp.float16), tiny(int4=(0,)), tiny()):
        masters, frozen = steps.split(model.params, steps.everything(model.params))
        assert jax.tree.leaves(frozen) == []
        assert {leaf.dtype for leaf in jax.tree.leaves(masters)} == {jnp.dtype(jnp.float32)}
        shifted = jax.tree.map(lambda x: x * 1.01 + 1e-4, masters)
        stored = steps.as_stored(shifted, model.params)
        assert jax.tree.structure(stored) == jax.tree.structure(model.params)
        for new, old in zip(jax.tree.leaves(stored), jax.tree.leaves(model.params), strict=True):
            assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert_identical(steps.rounded(shifted, model.params), jax.tree.map(dequantize, stored, is_leaf=is_leaf))


@pytest.mark.parametrize("weights", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_loss_is_that_of_the_model_as_stored(
    tiny: Build, examples: list[Encoded], one_device: Layout, weights: str
) -> None:
    """Quantized and bfloat16 weights and cache: each update's loss is the score of what the stage would return."""
    model = tiny(dtype=jnp.bfloat16, **{weights: (0,)}, storage=weights)
    everything = steps.everything(model.params)
    step, state, frozen = training.prepare(model, loss_of(model), SHORT, 2, everything, one_device)
    batch = one_device.join(pack_update(examples, (2, 8), 32, 6), 8)
    for _ in range(2):
        stored = model.replace(params=steps.as_stored(state.masters, model.params))
        assert is_leaf(stored.params["layers"]["0"]["up"]["kernel"])
        expected = mean_loss(stored, examples)
        state, means = step(state, frozen, None, batch)
        np.testing.assert_allclose(means["loss"], expected, atol=2e-4)


@pytest.mark.slow
def test_a_format_coarser_than_the_updates_still_learns(tiny: Build, examples: list[Encoded]) -> None:
    """One update is far below a step of int8; the float32 masters add them up."""
    model, config = tiny(int8=(0,)), TrainConfig(lr=2e-4, batch=16, accumulation=1, epochs=30)
    log: list[dict[str, Any]] = []
    tuned = finetune(model, examples, FinetuneConfig(config), log.append)
    old, new = (each.params["layers"]["0"]["up"]["kernel"] for each in (model, tuned))
    assert new.values.dtype == jnp.int8
    assert new.axes == old.axes
    assert new.scale.dtype == old.scale.dtype
    assert (new.values != old.values).any()
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.slow
def test_int4_weights_train_and_stay_int4(tiny: Build, examples: list[Encoded]) -> None:
    model, config = tiny(num_layers=2, int4=(0, 1)), TrainConfig(lr=2e-3, batch=16, accumulation=1, epochs=20)
    log: list[dict[str, Any]] = []
    tuned = finetune(model, examples, FinetuneConfig(config), log.append)
    assert jax.tree.structure(tuned.params) == jax.tree.structure(model.params)
    assert tuned.nbytes == model.nbytes
    old, new = (each.params["layers"]["0"]["up"]["kernel"].packed for each in (model, tuned))
    assert (old != new).any()
    assert log[-1]["loss"] < log[0]["loss"]
    np.testing.assert_allclose(mean_loss(tuned, examples), log[-1]["loss"], rtol=0.2)


def test_nothing_exists_for_frozen_leaves(tiny: Build, one_device: Layout) -> None:
    model = tiny(num_layers=2, int8=(0,))
    chosen = layer_mask(model.params, {1})
    _, state, frozen = training.prepare(model, loss_of(model), SHORT, 2, chosen, one_device)
    count = len(jax.tree.leaves(model.params["layers"]["1"]))
    assert len(jax.tree.leaves(state.masters)) == count
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert len(moments) == 2 * count
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(model.params)) - count
    assert_identical(steps.join(state.masters, frozen), model.params)


def frozen_updates(tx: optax.GradientTransformation, masters: Any, trainable: Any) -> Any:
    """What `tx` would add to the frozen leaves if they had gradients, all of them 1."""
    changes, _ = tx.update(jax.tree.map(jnp.ones_like, masters), tx.init(masters), masters)
    return jax.tree.leaves(jax.tree.map(lambda change, trains: None if trains else change, changes, trainable))


def test_optimizer_leaves_frozen_leaves_alone_even_with_gradients() -> None:
    layer = {"up": {"kernel": jnp.full(4, 0.5), "bias": jnp.full(4, 0.5)}}
    masters = {"embed": {"tokens": jnp.full(4, 0.5)}, "layers": {"0": layer, "1": layer}}
    chosen = layer_mask(masters, {1})
    ours = frozen_updates(steps.optimizer(SHORT, 10, chosen), masters, chosen)
    assert len(ours) == 3
    assert not any(change.any() for change in ours)
    # The trap: a mask alone hands the gradient through as the update, which climbs.
    with jax.numpy_dtype_promotion("standard"):
        trap = frozen_updates(optax.masked(optax.adamw(1e-3), chosen), masters, chosen)
    assert all((change == 1).all() for change in trap)


def test_only_kernels_and_embeddings_decay(tiny: Build) -> None:
    """With no gradient an update is -lr * decay * weight, or nothing."""
    masters = tiny().params
    tx = steps.optimizer(TrainConfig(lr=0.5, weight_decay=0.1), 10, steps.everything(masters))

    @jax.jit
    def change(masters: Any) -> Any:
        return tx.update(jax.tree.map(jnp.zeros_like, masters), tx.init(masters), masters)[0]

    declared = declare(tiny().config, tiny().spec)
    for what, update, weight in zip(*map(jax.tree.leaves, (declared, change(masters), masters)), strict=True):
        decay = {"kernel": 0.05, "embedding": 0.05, "bias": 0, "scale": 0}[what.kind]
        np.testing.assert_allclose(update, -decay * weight, rtol=1e-5)


def test_clip_is_of_the_trainable_leaves_norm() -> None:
    """AdamW's first moment after one update is a tenth of the gradient it was given."""
    masters, chosen = {"kernel": jnp.zeros(4), "frozen": jnp.zeros(4)}, {"kernel": True, "frozen": False}
    gradient = {"kernel": jnp.full(4, 3.0), "frozen": jnp.full(4, 1e6)}
    for clip, expected in ((1.0, 0.05), (None, 0.3), (100.0, 0.3)):
        tx = steps.optimizer(TrainConfig(clip=clip), 10, chosen)
        _, state = tx.update(gradient, tx.init(masters), masters)
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        np.testing.assert_allclose(moments[0], expected, rtol=1e-6)


def test_stops_where_the_loss_is_not_finite(tiny: Build, examples: list[Encoded]) -> None:
    model, log = tiny(), []
    model.params["final_norm"]["scale"] = model.params["final_norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(
        InputError, match=r"finetune stopped at update 1 of 6: its \w+ is nan; .* lower the learning rate"
    ):
        finetune(model, examples, FinetuneConfig(SHORT), log.append)
    assert log == []


def test_trains_in_bfloat16_compute(tiny: Build, examples: list[Encoded], whole: tuple[Any, Any]) -> None:
    model = tiny()
    masters, frozen = steps.split(model.params, steps.everything(model.params))
    step = jax.jit(partial(steps.gradients, loss_of(model, "bfloat16")))
    gradient, means = step(masters, frozen, None, pack_update(examples, (2, 8), 32, 6))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(means["loss"], whole[1]["loss"], rtol=0.05)
    assert means["loss"] != whole[1]["loss"]
    found, expected = (np.asarray(each["embed"]["tokens"]).ravel() for each in (gradient, whole[0]))
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.98


def test_bfloat16_moments(tiny: Build, one_device: Layout) -> None:
    """The first moment alone; the second would lose its small changes."""
    model, config = tiny(), TrainConfig(moments="bfloat16")
    _, state, _ = training.prepare(model, loss_of(model), config, 2, steps.everything(model.params), one_device)
    count = len(jax.tree.leaves(model.params))
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert dtypes.count(jnp.dtype(jnp.bfloat16)) == dtypes.count(jnp.dtype(jnp.float32)) == count


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"moments": "bfloat16"}, {"compute": "bfloat16"}, {"remat": True}])
def test_choices_of_memory_change_little(
    setting: dict[str, Any], run: Any, tiny: Build, examples: list[Encoded]
) -> None:
    """Rounding alone tells them apart."""
    log: list[dict[str, Any]] = []
    finetune(tiny(), examples, FinetuneConfig(dataclasses.replace(SHORT, **setting)), log.append)
    found, expected = ([entry["loss"] for entry in each] for each in (log, run[3]))
    np.testing.assert_allclose(found, expected, rtol=1e-5 if "remat" in setting else 2e-2)
    assert (found == expected) <= ("remat" in setting)  # the others do round


@pytest.mark.slow
def test_remat_keeps_little_for_the_backward_pass(tiny: Build, examples: list[Encoded]) -> None:
    """Each layer's input rather than all it made; counted where autodiff keeps it, before any compiler."""
    model, batch = tiny(), jax.tree.map(lambda x: jnp.asarray(x[0]), pack_update(examples, (1, 16), 32, 6))
    weights = {id(leaf) for leaf in jax.tree.leaves(model.params)}

    def kept(remat: bool) -> int:
        def loss(params: Any) -> jax.Array:
            return completion_loss(model.config, model.spec, model.how, params, batch, remat=remat)["loss"]

        _, backward = jax.vjp(loss, model.params)
        return sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(backward) if id(leaf) not in weights}.values())

    assert kept(remat=True) < 0.4 * kept(remat=False)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("compute", "int8"),
        ("moments", "float16"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("batch", 0),
        ("max_steps", 0),
        ("clip", -1.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{setting} is"):
        TrainConfig(**{setting: value})
