"""The handlers of the CPU's kernels refuse what does not fit before they read it: called as programs call them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.model.kernels import cpu

pytestmark = [
    pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler"),
    pytest.mark.usefixtures("native"),
]


def zeros(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.zeros(shape, dtype)


def called(target: str, out: tuple[int, ...], *given: jax.Array, dtype: str = "float32", **attributes: Any) -> Any:
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(out, dtype))(*given, **attributes)


ROWS, MATRIX, OUT = (2, 16), (16, 32), (2, 32)


@pytest.mark.parametrize(
    ("rows", "matrix", "out", "turned", "why"),
    [
        ((9, 16), MATRIX, (9, 32), False, "1 to 8 rows"),
        ((1000, 16), MATRIX, (1000, 32), False, "1 to 8 rows"),
        (ROWS, MATRIX, (3, 32), False, r"out \[M, N\]"),
        (ROWS, MATRIX, (2, 64), False, r"out \[M, N\]"),
        (ROWS, MATRIX, OUT, True, r"out \[M, N\]"),
        (ROWS, (32, 16), OUT, False, r"out \[M, N\]"),
        (ROWS, (8, 32), OUT, False, r"out \[M, N\]"),
        (ROWS, (16,), OUT, False, r"out \[M, N\]"),
        (ROWS, (1, 16, 32), OUT, False, r"out \[M, N\]"),
        ((2, 24), (24, 32), OUT, False, "K a multiple of 16"),
        ((2, 24), (32, 24), OUT, True, "K a multiple of 16"),
        (ROWS, (16, 33), (2, 33), False, "N one of 32"),
        ((16,), MATRIX, OUT, False, "rank"),
        ((1, 2, 16), MATRIX, OUT, False, "rank"),
        (ROWS, MATRIX, (1, 2, 32), False, "rank"),
    ],
)
def test_shapes_of_products(
    rows: tuple[int, ...], matrix: tuple[int, ...], out: tuple[int, ...], turned: bool, why: str
) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*(?s:.*){why}"):
        np.asarray(called("chai_jax_few_rows", out, zeros(*rows), zeros(*matrix), turned=turned))


@pytest.mark.parametrize(
    ("rows", "matrix", "out"),
    [
        ("bfloat16", "float32", "float32"),
        ("int8", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("float32", "int32", "float32"),
        ("float32", "uint8", "float32"),
        ("float32", "float32", "bfloat16"),
    ],
)
def test_types_of_products(rows: str, matrix: str, out: str) -> None:
    given = zeros(*ROWS, dtype=rows), zeros(*MATRIX, dtype=matrix)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"dtype|expected a matrix of float32, bfloat16 or int8"):
        np.asarray(called("chai_jax_few_rows", OUT, *given, dtype=out, turned=False))


def test_a_product_whose_attribute_is_missing_or_of_another_type() -> None:
    for attributes in ({}, {"turned": np.int32(7)}, {"other": True}):
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            np.asarray(called("chai_jax_few_rows", OUT, zeros(*ROWS), zeros(*MATRIX), **attributes))


# What fits: query [B, C, q, R], keys [B, C, S, R], values [B, C v, S, Rv], allowed [B, S], out [B, C, q v, Rv].
FITS = {"query": (2, 3, 1, 8), "keys": (2, 3, 5, 8), "values": (2, 6, 5, 4), "allowed": (2, 5), "out": (2, 3, 2, 4)}
SCALES = (2, 3, 5), (2, 6, 5)


def attention(
    shapes: dict[str, tuple[int, ...]],
    scales: tuple[tuple[int, ...], ...] = (),
    stored: tuple[str, str] = ("float32", "float32"),
    scale: str = "bfloat16",
    allowed: str = "bool",
) -> np.ndarray:
    query, keys, values, readable = (
        zeros(*shapes[name], dtype=dtype) for name, dtype in zip(shapes, ("float32", *stored, allowed), strict=False)
    )
    given = query, keys, values, readable, *(zeros(*shape, dtype=scale) for shape in scales)
    return np.asarray(called("chai_jax_attention", shapes["out"], *given))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_attention_of_what_fits(stored: str) -> None:
    found = attention(FITS, SCALES if stored == "int8" else (), (stored, stored))
    np.testing.assert_array_equal(found, np.zeros(FITS["out"]))


@pytest.mark.parametrize(("part", "axis"), [(part, axis) for part, shape in FITS.items() for axis in range(len(shape))])
def test_shapes_of_attention(part: str, axis: int) -> None:
    """A size that is another than the rest asks for; an axis less."""
    shape = FITS[part]
    for sizes in ([shape[axis] - 1], [shape[axis] + 1000], []):
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            attention(FITS | {part: (*shape[:axis], *sizes, *shape[axis + 1 :])})


@pytest.mark.parametrize(
    "spoiled",
    [
        {"values": (2, 9, 5, 4)},
        {"keys": (2, 3, 0, 8), "values": (2, 6, 0, 4), "allowed": (2, 0)},
    ],
    ids=["more values", "no columns"],
)
def test_arrays_that_fit_in_part(spoiled: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        attention(FITS | spoiled)


@pytest.mark.parametrize(
    ("stored", "scales", "scale"),
    [
        (("float32", "bfloat16"), (), "bfloat16"),
        (("int8", "float32"), SCALES[:1], "bfloat16"),
        (("float16", "float16"), (), "bfloat16"),
        (("uint8", "uint8"), SCALES, "bfloat16"),
        (("int8", "int8"), (), "bfloat16"),
        (("int8", "int8"), SCALES[:1], "bfloat16"),
        (("int8", "int8"), (*SCALES, (1,)), "bfloat16"),
        (("int8", "int8"), SCALES, "float32"),
        (("int8", "int8"), SCALES[::-1], "bfloat16"),
        (("int8", "int8"), ((2, 3), (2, 6)), "bfloat16"),
        (("float32", "float32"), SCALES, "bfloat16"),
    ],
)
def test_types_and_scales_of_attention(
    stored: tuple[str, str], scales: tuple[tuple[int, ...], ...], scale: str
) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        attention(FITS, scales, stored, scale)


def test_columns_that_may_be_read_are_told_by_bool() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="dtype"):
        attention(FITS, allowed="int8")
