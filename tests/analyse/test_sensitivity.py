"""Scores agree with scoring the perturbed model as a whole; tiers and critical clusters have known answers."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.analyse.damage import Damage
from chai_jax.analyse.probe import probe
from chai_jax.analyse.sensitivity import critical, perturbed, sensitivities, tiers
from chai_jax.compress.calibration import joined
from chai_jax.compress.quantize import CONTRACTED
from chai_jax.errors import InputError
from chai_jax.model.model import Model
from chai_jax.model.quantized import QuantizedArray
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan

Make = Callable[..., Model]
PARTITION = (ClusterPlan((0, 3, 5), 3), ClusterPlan((1,), 1), ClusterPlan((2, 4), 2))
LAYERS = [LayerPlan(PARTITION)] * 3


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_damage_is_that_of_the_whole_perturbed_model(
    make: Make, config: Architecture, windows: list[list[int]]
) -> None:
    model, plan = make(config), Plan((), "qkv" if config.pre_norm else "qk")
    found = probe(model, windows)
    tokens, mask = found.tokens, found.mask
    damage = Damage(model, tokens, mask)
    real = mask[:, 1:]
    right = log_softmax(np.asarray(model(tokens, mask), np.float64))[:, :-1][real]
    at = np.arange(len(right)), tokens[:, 1:][real]
    for index in range(3):
        layer, params = perturbed(model, index, LAYERS[index], plan)
        layers = {**model.params["layers"], str(index): params}
        whole = model.replace(spec=model.spec.with_layer(index, layer), params={**model.params, "layers": layers})
        wrong = log_softmax(np.asarray(whole(tokens, mask), np.float64))[:, :-1][real]
        divergence, rise = damage.of(index, layer, params)
        wanted = (np.exp(right) * (right - wrong)).sum(axis=-1).mean()
        assert wanted > 0.01
        assert divergence == pytest.approx(wanted, rel=1e-4)
        assert rise == pytest.approx((right[at] - wrong[at]).mean(), abs=1e-5)
        assert damage.of_model(whole) == pytest.approx((divergence, rise), rel=1e-5)


def test_perturbed_is_merged_and_stored_as_the_low_tier(make: Make) -> None:
    layer, params = perturbed(make(), 1, LAYERS[1], Plan((), "qkv"))
    assert layer.share == "qkv"
    assert layer.storages == ("int8",) * 3
    assert all(isinstance(params[name]["kernel"], QuantizedArray) for name in CONTRACTED.keys() - {"gate"})


@pytest.mark.parametrize("method", ["perturbation", "kl"])
def test_a_layer_that_does_nothing_is_not_sensitive(make: Make, windows: list[list[int]], method: str) -> None:
    model = make()
    for name in ("output", "down"):
        leaves = model.params["layers"]["1"][name]
        leaves["kernel"] = jnp.zeros_like(leaves["kernel"])
    scores = sensitivities(model, probe(model, windows), LAYERS, Plan((), "qkv"), method)
    assert scores[1] == pytest.approx(0, abs=1e-6)
    assert abs(scores[0]) > 1e-3
    assert abs(scores[2]) > 1e-3


def test_an_output_error_is_relative_to_what_the_layer_adds(make: Make, windows: list[list[int]]) -> None:
    model = make()
    found = probe(model, windows)
    damage, layer, params = Damage(model, found.tokens, found.mask), model.spec.layers[1], model.params["layers"]["1"]
    assert damage.of_output(1, layer, params) == pytest.approx(0, abs=1e-6)
    silent = {name: {part: jnp.zeros_like(leaf) for part, leaf in params[name].items()} for name in ("output", "down")}
    # A layer that adds nothing has lost all that it added.
    assert damage.of_output(1, layer, {**params, **silent}) == pytest.approx(1, rel=1e-5)


def test_attention_is_the_mean_absolute_score_of_the_probe(make: Make, windows: list[list[int]]) -> None:
    model = make()
    found = probe(model, windows)
    assert sensitivities(model, found, LAYERS, Plan((), "qk"), "attention") == tuple(found.scores)


def test_few_tokens_take_fewer_windows(make: Make, windows: list[list[int]]) -> None:
    model = make()
    found = probe(model, windows)
    # 75 tokens in 7 windows: 25 tokens are 3 windows, spread evenly.
    few = dataclasses.replace(found, tokens=found.tokens[[0, 2, 4]], mask=found.mask[[0, 2, 4]])
    some = sensitivities(model, few, LAYERS, Plan((), "qk"))
    assert sensitivities(model, found, LAYERS, Plan((), "qk"), tokens=25) == some


def test_an_unknown_method_is_refused(make: Make, windows: list[list[int]]) -> None:
    with pytest.raises(InputError, match="expected one of attention, perturbation, kl"):
        sensitivities(make(), probe(make(), windows), LAYERS, Plan((), "qk"), "entropy")


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([0.1], "h"),
        ([0.1, 0.2], "mh"),
        ([5, 4, 3, 2, 1], "hmmml"),
        ([1, 8, 2, 7, 3, 6, 4, 5], "lhlhmmmm"),
        ([3, 1, 2, 9, 9, 9, 0, 5, 6, 7, 8, 4], "mllhhhlmmmmm"),
        (range(24), "l" * 7 + "m" * 12 + "h" * 5),
        ([1] * 10, "hhmmmmmlll"),
        ([2, 1, 1, 1, 2, 2], "hmmlhm"),
        ([-0.5, 0.0, -1.0, 0.1], "mmlh"),
    ],
)
def test_tiers(scores: list[float], wanted: str) -> None:
    assert "".join(tier[0] for tier in tiers([float(score) for score in scores])) == wanted


def singles(*squares: float) -> tuple[np.ndarray, tuple[tuple[int, ...], ...]]:
    return np.diag(squares), tuple((head,) for head in range(len(squares)))


@pytest.mark.parametrize(
    ("squares", "wanted"),
    [
        ((3.0,), [True]),
        ((0.0,), [True]),
        ((1.0, 4.0, 2.0), [False, True, False]),
        ((3.0, 1.0, 1.0, 1.0), [True, False, False, False]),
        ((2.0, 1.0, 2.0, 1.0), [True, False, True, False]),
        ((1.0, 1.0, 1.0), [True, True, False]),
    ],
)
def test_critical_clusters_make_up_half_of_the_output(squares: tuple[float, ...], wanted: list[bool]) -> None:
    assert list(critical(*singles(*squares))) == wanted


def test_what_heads_of_a_cluster_cancel_does_not_count() -> None:
    outputs = np.asarray([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    assert critical(outputs, ((0, 1), (2,))) == (False, True)
    assert critical(np.abs(outputs), ((0, 1), (2,))) == (True, False)
    assert critical(outputs, ((0,), (1,), (2,))) == (True, True, False)


def test_short_texts_are_joined() -> None:
    """Two texts in three, one after another, in whole windows of a few blocks."""

    @dataclasses.dataclass
    class Read:
        tokens: np.ndarray
        mask: np.ndarray

    tokens = np.arange(60 * 20, dtype=np.int32).reshape(60, 20)
    mask = np.arange(20) < np.where(np.arange(60) % 2, 20, 10)[:, None]  # 900 tokens
    windows, real = joined(Read(tokens, mask), 600, 1000)
    chosen = tokens[np.arange(40) * 60 // 40][mask[np.arange(40) * 60 // 40]]
    assert windows.shape == (1, 512)
    np.testing.assert_array_equal(windows[0], chosen[:512])
    assert real.all()
    assert joined(Read(tokens, mask), 10**6, 300)[0].shape == (3, 300)
    for few, positions in ((100, 1000), (10**6, 127)):
        with pytest.raises(InputError, match="expected at least 128 of both"):
            joined(Read(tokens, mask), few, positions)
