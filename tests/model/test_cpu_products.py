"""Products by the kernels of CPUs: against numpy in float64, and which they are."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model.execution import Execution
from chai_jax.model.kernels import cpu, products_cpu
from chai_jax.model.products import product
from chai_jax.model.quantized import QuantizedArray, dequantize, multiply, quantize_int4, quantize_int8
from chai_jax.serve import decode as serve

pytestmark = [
    pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler"),
    pytest.mark.usefixtures("small_matrices"),
]
Normal = Callable[..., jax.Array]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", range(1, products_cpu.MOST + 1))
@pytest.mark.parametrize(("terms", "columns", "turned"), [
    (16, 12320, False),  # several panels of columns, of up to eight threads, the last one not full
    (16, 32, False),
    (48, 37, True),  # an odd number, split over threads
    (16, 1, True),
])  # fmt: skip
def test_a_few_rows_times_a_matrix(
    normal: Normal, rows: int, terms: int, columns: int, turned: bool, dtype: str
) -> None:
    assert products_cpu.takes(rows, terms, columns, dtype, turned)
    given = normal(rows, terms), normal(*((columns, terms) if turned else (terms, columns)), dtype=dtype)
    found = jax.jit(partial(products_cpu.times, turned=turned))(*given)
    one, two = (np.asarray(x, np.float64) for x in given)
    expected = one @ (two.T if turned else two)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_what_the_kernel_of_products_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products_cpu.takes(8, 16, 32, "float32", False)
    assert not products_cpu.takes(9, 16, 32, "float32", False)
    assert not products_cpu.takes(8, 24, 32, "float32", False)
    assert not products_cpu.takes(8, 16, 48, "float32", False)
    assert products_cpu.takes(8, 16, 48, "float32", True)
    assert not products_cpu.takes(8, 16, 32, "float16", False)
    monkeypatch.setattr(products_cpu, "LEAST", 2 * 16 * 32)
    assert products_cpu.takes(2, 16, 32, "float32", False)
    assert not products_cpu.takes(1, 16, 32, "float32", False)
    assert products_cpu.takes(1, 16, 32, "int8", False)  # XLA would expand it at every token
    assert not products_cpu.takes(1, 16, 0, "int8", False)
    assert not products_cpu.takes(0, 16, 32, "int8", False)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_of_products(normal: Normal, turned: bool) -> None:
    """Whoever takes one: the gradients of a product are those of XLA's."""
    rows, matrix = normal(3, 32), normal(*((64, 32) if turned else (32, 64)))

    def loss(multiply, rows, matrix):  # type: ignore[no-untyped-def]
        return jnp.sum(jnp.sin(multiply(rows, matrix) / 16))

    def plain(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        return rows @ (matrix.T if turned else matrix)

    found, expected = (
        jax.jit(jax.grad(partial(loss, multiply), argnums=(0, 1)))(rows, matrix)
        for multiply in (partial(products_cpu.times, turned=turned), plain)
    )
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("native")
def test_the_gradient_of_rows_times_int8(normal: Normal) -> None:
    rows, matrix = normal(3, 16), normal(16, 32, dtype="int8")
    found = jax.grad(lambda rows: jnp.sum(products_cpu.times(rows, matrix, False)))(rows)
    np.testing.assert_allclose(found, jnp.broadcast_to(matrix.astype(jnp.float32).sum(1), (3, 16)), rtol=1e-6)


def test_int8_weights_are_read_as_they_are_stored_where_there_are_kernels(normal: Normal, native: Execution) -> None:
    """By few rows and by many; int4 is expanded, and without kernels so is int8."""
    x, few = normal(2, 3, 32), slice(0, 1)
    weights = {"int8": quantize_int8(normal(32, 64), (-2,), jnp.float32), "int4": quantize_int4(normal(32, 64), -2, 8)}
    plain = native.replace(kernels="xla")
    assert all(isinstance(leaf, jax.Array) for leaf in serve.cast(weights, plain).values())
    kept = serve.cast(weights, native)
    assert isinstance(kept["int8"], QuantizedArray)
    assert isinstance(kept["int4"], jax.Array)
    run = jax.jit(partial(multiply, "btd,df->btf", kernels="native"))
    assert "chai_jax_few_rows" in str(run.trace(x[:, few], kept["int8"]).jaxpr)
    many = jnp.concatenate([x] * 4, axis=1)
    expected = x @ dequantize(weights["int8"])
    for rows, each in ((x, expected), (many, jnp.concatenate([expected] * 4, axis=1))):
        np.testing.assert_allclose(run(rows, kept["int8"]), each, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("equation", "row", "shapes", "kernel"),
    [
        ("btd,df->btf", "t", ((2, 3, 32), (32, 64)), True),
        ("btd,dhr->bthr", "t", ((2, 1, 32), (32, 4, 8)), True),
        ("bhtr,hrd->btd", "t", ((2, 4, 1, 8), (4, 8, 32)), True),
        ("ve,bte->vbt", "t", ((7, 32), (2, 1, 32)), True),
        ("btd,df->btf", "t", ((2, 5, 32), (32, 64)), False),  # ten rows
        ("bcmk,bcsk->bcms", "m", ((1, 2, 1, 32), (1, 2, 32, 32)), False),  # a matrix for each cluster
    ],
)
def test_which_products_are_kernels(
    normal: Normal, equation: str, row: str, shapes: tuple[tuple[int, ...], ...], kernel: bool
) -> None:
    """Those of a few rows with one matrix, however their axes are called."""
    one, two = (normal(*shape) for shape in shapes)
    run = jax.jit(lambda one, two: product(equation, one, two, row, "native"))
    assert ("ffi_call" in str(run.trace(one, two).jaxpr)) == kernel
    expected = np.einsum(equation, np.asarray(one, np.float64), np.asarray(two, np.float64))
    np.testing.assert_allclose(run(one, two), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
