"""Tests run with the settings that tests/conftest.py says, in either way."""

import os

import jax
import jax.numpy as jnp
import pytest

from chai_jax.model.execution import Execution
from chai_jax.model.kernels import cpu
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import Spec
from chai_jax.serve import decode as serve

AS_USER = os.environ.get("CHAI_JAX_TEST_AS_USER") == "1"
CONFIG = Architecture(64, 32, 2, 4, 64, 64, 32)


@pytest.mark.as_user
def test_devices_flags_and_kernels_are_a_users_or_not() -> None:
    """A user has one device, no flags, and the kernels of CPUs where they can be compiled; a token is made by them."""
    assert len(jax.devices()) == (1 if AS_USER else 8)
    assert ("XLA_FLAGS" in os.environ) != AS_USER
    how = Execution.choose()
    assert how.kernels == ("native" if AS_USER and cpu.compiler() else "xla")
    spec = Spec.dense(2, 4, 8)
    params = init(CONFIG, spec, jax.random.key(0))
    tokens, mask = serve.pad_right([[2, 9, 4]], 1)
    rule = serve.Sampling.checked(), jnp.int32(2)
    keys = jax.random.split(jax.random.key(0), 1)
    state = serve.prefill(CONFIG, spec, params, tokens, mask, keys, *rule, capacity=64, how=how)
    program = serve.decode.lower(CONFIG, spec, params, state, jnp.int32(40), *rule, how=how).as_text()
    assert ("chai_jax_" in program) == (how.kernels == "native")
