"""What a person may give as MODEL, and the defaults that come with it."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from chai_jax import sources
from chai_jax.config import PlanConfig, TrainConfig
from chai_jax.errors import InputError
from chai_jax.files.published import random_model
from chai_jax.files.store import load
from chai_jax.sources import open_model, shape_of, source_of


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("toy", sources.TOY),
        ("random:facebook/opt-125m", sources.RANDOM),
        ("random:", sources.RANDOM),
        *((name, sources.PRETRAINED) for name in ("facebook/opt-125m", "./toy", "toys", "toy:1", "random", "a:b", "")),
    ],
)
def test_the_kind_of_a_model(model: str, source: sources.Source) -> None:
    assert source_of(model) is source


def test_a_folder_is_loaded(small_model: Path) -> None:
    found, expected = open_model(str(small_model)), load(small_model)
    np.testing.assert_array_equal(found.params["embed"]["tokens"], expected.params["embed"]["tokens"])


def test_a_shape_is_known_without_weights(small_model: Path, tmp_path: Path) -> None:
    shutil.copy(small_model / "config.json", tmp_path)
    assert shape_of(str(tmp_path)) == shape_of(f"random:{tmp_path}") == load(small_model).config
    with pytest.raises(InputError, match="no weights"):
        open_model(str(tmp_path))


def test_random_weights_come_from_the_seed(small_model: Path) -> None:
    name = f"random:{small_model}"
    one, same, other = open_model(name, seed=1), random_model(str(small_model), 1), open_model(name, seed=2)
    np.testing.assert_array_equal(one.params["embed"]["tokens"], same.params["embed"]["tokens"])
    assert bool((one.params["embed"]["tokens"] != other.params["embed"]["tokens"]).any())
    assert (one.config, one.source) == (load(small_model).config, name)


@pytest.mark.parametrize("model", ["toy", "random:facebook/opt-125m"])
def test_what_has_no_revisions_refuses_one(model: str) -> None:
    with pytest.raises(InputError, match="has no revision 'v2'; expected one of a hub id only: leave it out"):
        open_model(model, "v2")


def test_a_source_fills_what_was_not_asked_for() -> None:
    planning = PlanConfig(rank=0.5)
    assert planning.filled(sources.TOY.planning) == dataclasses.replace(planning, layers=1.0, clusters="2")
    assert planning.filled(sources.PRETRAINED.planning) == dataclasses.replace(planning, layers=0.5, clusters="elbow")
    asked = PlanConfig(layers=0.0, clusters="3")
    assert asked.filled(sources.TOY.planning) == asked


def test_only_the_toy_is_trained_by_settings_of_its_own() -> None:
    paper = TrainConfig()
    assert sources.TOY.train.apply(paper) != paper
    assert sources.PRETRAINED.train.apply(paper) == sources.RANDOM.train.apply(paper) == paper
