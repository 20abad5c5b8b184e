"""What decides a program is passed: dtype, devices and kernels, chosen once and carried by the model."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from chai_jax import Execution, load, with_storage
from chai_jax.errors import InputError
from chai_jax.model.sharding import Layout, make_mesh, one_device


def test_what_is_not_asked_for_suits_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight CPUs here: float32, split by batch, and no kernels."""
    assert Execution.choose() == Execution(np.dtype("float32"), Layout(make_mesh()), "xla")
    assert Execution.choose("bfloat16").dtype == "bfloat16"
    monkeypatch.setattr(Layout, "platform", "tpu")
    assert Execution.choose().dtype == "bfloat16"
    assert Execution.choose("float32").dtype == "float32"


def test_kernels_that_the_devices_cannot_have_are_refused() -> None:
    with pytest.raises(InputError, match="native is for one CPU, not for 8 x cpu"):
        Execution.choose(kernels="native")
    with pytest.raises(InputError, match="pallas has no kernel for cpu"):
        Execution.choose(layout=one_device(), kernels="pallas")


def test_programs_are_compiled_for_each() -> None:
    """Equal ones share a program; a dtype, a mesh or kernels of its own make another."""
    traced = []

    @partial(jax.jit, static_argnums=0)
    def run(how: Execution, x: jax.Array) -> jax.Array:
        traced.append(how)
        return x

    one = Execution.choose(layout=one_device())
    others = one.replace(dtype=np.dtype("float16")), Execution.choose(), one.replace(kernels="native")
    for how in (one, Execution.choose(layout=one_device()), *others, one):
        run(how, jax.numpy.zeros(2))
    assert traced == [one, *others]


def test_a_model_carries_it_from_stage_to_stage(small_model: Path) -> None:
    how = Execution.choose("bfloat16", Layout(make_mesh(2)))
    model = load(small_model, execution=how)
    assert with_storage(model, "int8").how is how
    assert load(small_model).how == Execution.choose()
    tokens = np.array([[2, 5, 6]])
    found, expected = model(tokens), load(small_model)(tokens)
    assert found.dtype == expected.dtype == "float32"
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert (np.asarray(found) != np.asarray(expected)).any()
