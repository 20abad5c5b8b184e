"""What a Flax checkpoint may hold, and how the parts it cuts large arrays into come together again."""

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from flax import serialization

from chai_jax.errors import InputError
from chai_jax.files.flax_msgpack import read_flax, torch_name

KERNEL = np.arange(12, dtype=np.float16).reshape(3, 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flax_model.msgpack"


def test_kernels_are_given_in_torch_s_layout(path: Path) -> None:
    path.write_bytes(
        serialization.msgpack_serialize({"model": {"fc1": {"kernel": KERNEL}, "norm": {"scale": KERNEL[0]}}})
    )
    tensors = read_flax(path)
    assert {name: stored.shape for name, stored in tensors.items()} == {
        "model.fc1.weight": (4, 3),
        "model.norm.weight": (4,),
    }
    np.testing.assert_array_equal(tensors["model.fc1.weight"].read(), KERNEL.T)


def test_names() -> None:
    assert torch_name(("model", "decoder", "embed_tokens", "embedding")) == "model.decoder.embed_tokens.weight"
    assert torch_name(("a", "bias")) == "a.bias"


def test_arrays_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 6)
    path.write_bytes(serialization.msgpack_serialize({"embed_tokens": {"embedding": KERNEL}}))
    assert path.read_bytes().count(b"__msgpack_chunked_array__") == 1
    np.testing.assert_array_equal(read_flax(path)["embed_tokens.weight"].read(), KERNEL)


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"a": {"kernel": 3}}, "'a/kernel' is a int, not an array"),
        ({"a": {"kernel": np.zeros(2, "<U4")}}, "an array of 'str128'"),
        ({"a": {"kernel": np.zeros(2, int)}}, "an array of 'int64'"),
        ({"a": 1 + 2j}, "extension 2"),
        ({"a": [KERNEL]}, "exceeds max_array_len"),
        (KERNEL, "'' is a ndarray, not an array"),
    ],
)
def test_anything_else_is_refused(path: Path, tree: Any, reason: str) -> None:
    path.write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(InputError, match="is not a whole Flax checkpoint") as caught:
        read_flax(path)
    assert reason in str(caught.value)


def test_two_leaves_of_one_name(path: Path) -> None:
    path.write_bytes(serialization.msgpack_serialize({"a": {"kernel": KERNEL, "embedding": KERNEL}}))
    with pytest.raises(InputError, match=r"holds 'a\.weight' twice, the second as 'a/"):
        read_flax(path)


def test_more_than_parameters(path: Path) -> None:
    path.write_bytes(serialization.msgpack_serialize({"a": {"kernel": KERNEL}}) + b"\x00")
    with pytest.raises(InputError, match="something follows the parameters"):
        read_flax(path)


NUMBERS = KERNEL.tobytes()


def packed(shape: Any, dtype: Any = "float16", buffer: Any = NUMBERS) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, buffer)))


FLAT = packed([12])


def pieces(shape: Any, chunks: Any) -> dict[str, Any]:
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (packed([3, 5]), "12 numbers for the shape [3, 5]"),
        (packed([3, -1]), "12 numbers for the shape [3, -1]"),
        (packed([2**62, 2**62]), "12 numbers for the shape"),
        (packed([3, 4.0]), "12 numbers for the shape"),
        (packed(["3", 4]), "12 numbers for the shape"),
        (packed([[3], 4]), "12 numbers for the shape"),
        (packed([3, [4]]), "lists in an array"),
        (packed([1] * 33), "exceeds max_array_len"),
        (packed(12), "12 numbers for the shape 12"),
        (packed([12], buffer=NUMBERS[1:]), "buffer size must be a multiple"),
        (packed([12], buffer=12), "a bytes-like object is required"),
        (packed([12], dtype=["float16"]), "lists in an array"),
        (msgpack.ExtType(1, b""), "incomplete input"),
        (pieces({"0": 12}, {"0": FLAT, "1": FLAT}), "24 numbers for the shape [12]"),
        (pieces({"0": -1}, {"0": FLAT}), "12 numbers for the shape [-1]"),
        (pieces({"0": 12}, {"1": FLAT}), "'0'"),
        (pieces({"1": 12}, {"0": FLAT}), "'0'"),
        (pieces({"0": 12}, {}), "at least one array"),
        (pieces({"0": 12}, {"0": 12}), "no flat arrays of one kind"),
        (pieces({"0": 12}, {"0": packed([3, 4])}), "no flat arrays of one kind"),
        (pieces({"0": 18}, {"0": FLAT, "1": packed([6], "float32")}), "no flat arrays of one kind"),
        (pieces(12, {"0": FLAT}), "an array in pieces without shape or pieces"),
        (pieces({"0": 12}, FLAT), "an array in pieces without shape or pieces"),
        ({"__msgpack_chunked_array__": True}, "'shape'"),
    ],
)
@pytest.mark.parametrize("at", ["top", "inside"])
def test_misshapen_arrays(path: Path, tree: Any, reason: str, at: str) -> None:
    path.write_bytes(msgpack.packb(tree if at == "top" else {"a": {"kernel": tree}}))
    with pytest.raises(InputError, match="is not a whole Flax checkpoint") as caught:
        read_flax(path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_array_in_pieces_needs_a_name(path: Path) -> None:
    path.write_bytes(msgpack.packb(pieces({"0": 12}, {"0": FLAT})))
    with pytest.raises(InputError, match="'' is a ndarray, not an array"):
        read_flax(path)
