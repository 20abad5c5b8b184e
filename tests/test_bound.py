"""The rate-distortion bound of a cache: known answers, and no real cache below it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from chai_jax.analyse.budget import Budget, parts
from chai_jax.analyse.damage import Damage
from chai_jax.analyse.probe import probe
from chai_jax.compress.basis_stream import BasisStream
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.spec import Spec
from tests.analyse.test_basis_costs import CONFIG

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "lab"]:
        del sys.modules[name]


def test_water_filling() -> None:
    """Equal variances fall by four a bit; of two unequal ones the smaller gets none while the level is above it."""
    from lab.bound import least

    for bits in (0.5, 1.0, 4.0):
        assert least([np.full(3, 2.0), np.full(5, 2.0)], bits) == pytest.approx(16 * 4.0**-bits)
    assert least([np.asarray([16.0, 1.0])], 0.5) == pytest.approx(4 + 1)  # one bit, all of it for the larger
    assert least([np.asarray([16.0, 1.0])], 2.0) == pytest.approx(2 * np.sqrt(16.0) / 16)  # both at one level
    assert least([np.asarray([3.0, 0.0])], 0.5) == pytest.approx(0.75)  # what never varies costs nothing


@pytest.mark.slow
def test_no_real_cache_does_less_damage() -> None:
    from lab.bound import TRIED, least, spectra

    spec = Spec.of(CONFIG, "bfloat16")
    model = Model(CONFIG, spec, init(CONFIG, spec, jax.random.key(1), 0.1))
    seen = probe(model, np.random.default_rng(0).integers(3, 60, (8, 200)).tolist())
    fit, text = parts(CONFIG, seen, Budget(0.2, shares=(), storages=("basis3",), ranks=False, tokens=800))
    found = spectra(model, fit, text)
    assert [one.shape for one in found] == [(2 * CONFIG.kv_width,)] * 2
    assert all((one >= 0).all() for one in found)
    damage, stream = Damage(model, *text), BasisStream(model, fit)
    for index, one in enumerate(found):
        channels = stream.basis.channels(2.4)
        layer = damage.model.spec.layers[index].stored_as([TRIED] * CONFIG.kv_heads, channels)
        params = {**model.params["layers"][str(index)], "basis": stream.params(channels)}
        token = sum(bits * count for bits, count in channels) / CONFIG.head_dim  # without any scales
        real = damage.of(index, layer, params)[0]
        assert 0.02 * real < least([one], (token + 3) / 2) < real
        stream.advance()
