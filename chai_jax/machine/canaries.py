"""Whether the jax that is installed computes rightly on CPUs: two programs that some of its versions do not.

A program of its own for each (`python chai_jax/machine/canaries.py NAME`), since a wrong version may crash or hang in
it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CANARY_SECONDS = 60  # that one may take: a second or two, most of it jax's start
RIGHT = "right"


def dot_then_sum() -> float:
    """0, the error of a dot whose squares are summed; jax 0.10.2 miscompiles it (jax-ml/jax#39103)."""
    import jax
    import jax.numpy as jnp

    first = jnp.arange(32769.0)
    rows = jnp.stack((first, jnp.zeros_like(first), jnp.zeros_like(first)), axis=1)
    found = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    return float(found[-1]) - 32768.0**2


def sum_over_eight_axes() -> float:
    """0, the error of a product with eight axes, one of them summed; jax 0.10.2 and 0.11.0 crash or hang in it
    (jax-ml/jax#39257)."""
    import jax
    import jax.numpy as jnp

    few, many = jnp.ones((10, 4, 6)), jnp.ones((10, 4, 6, 9, 9, 9, 9, 9))
    run = jax.jit(lambda few, many: jnp.sum(few[..., None, None, None, None, None] * many, axis=2))
    return float(jnp.abs(run(few, many) - 6).max())


CANARIES: dict[str, Callable[[], float]] = {canary.__name__: canary for canary in (dot_then_sum, sum_over_eight_axes)}


def outcomes() -> dict[str, str]:
    """What became of each canary: `RIGHT`, or in a few words what is wrong. Takes a few seconds, 60 at most."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(CANARIES, pool.map(_outcome, CANARIES), strict=True))


def _outcome(name: str) -> str:
    # -P: beside this file are modules that no other library may take for its own.
    command = [sys.executable, "-P", __file__, name]
    try:
        done = subprocess.run(
            command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=CANARY_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"hangs: no result within {CANARY_SECONDS} s"
    except OSError as error:
        return f"not tried: {error}"
    if done.returncode < 0:
        return f"crashes: {signal.Signals(-done.returncode).name}"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip()
    return said.splitlines()[-1] if said else f"ends with status {done.returncode}"


if __name__ == "__main__":
    error = CANARIES[sys.argv[1]]()
    print(f"wrong by {error:g}" if error else RIGHT)
