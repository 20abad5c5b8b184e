"""A .bin is data: nothing of it runs, and no size, offset or stride in it is believed."""

import os
import pickle
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from chai_jax.errors import InputError
from chai_jax.files.torch_pickle import read_torch
from tests.files.pickles import FLOATS, archive, name, number, numbers, row, state, storage, tensor, text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


class Bomb:
    """Unpickled in earnest, makes a file."""

    def __init__(self, path: Path):
        self.command = f"touch {path}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def zipped(path: Path, value: object) -> None:
    archive(path, pickle.dumps(value, 2))


def streamed(path: Path, value: object) -> None:
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {}, value, []):
            pickle.dump(part, file, 2)


def bare(path: Path, value: object) -> None:
    path.write_bytes(pickle.dumps(value, 4))


@pytest.mark.parametrize("write", [zipped, streamed, bare])
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: OrderedDict(w=bomb), lambda bomb: [{"a": (bomb,)}]])
def test_what_a_file_says_is_not_run(path: Path, tmp_path: Path, write: Any, wrap: Any) -> None:
    made = tmp_path / "made"
    write(path, wrap(Bomb(made)))
    module = os.system.__module__
    with pytest.raises(InputError, match=rf"imports '{module}\.system'; .* nothing of it was run: do not use it"):
        read_torch(path)
    assert not made.exists()
    os.system(Bomb(made).command)
    assert made.exists()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch", "load"),
        ("torch", "FloatStorage.from_file"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch.storage", "_load_from_bytes"),
        ("numpy", "frombuffer"),
        ("chai_jax.files.torch_pickle", "Tensor"),
    ],
)
def test_all_other_names_are_refused(path: Path, module: str, attribute: str) -> None:
    archive(path, state(name(module, attribute) + b")R"))
    with pytest.raises(InputError, match=rf"imports '{module}\.{attribute}';"):
        read_torch(path)


def test_a_tensor_as_torch_writes_it(path: Path) -> None:
    archive(path, state(tensor(1, (2, 3), (3, 1))))
    stored = read_torch(path)["w"]
    assert (stored.shape, stored.dtype, stored.file) == ((2, 3), "float32", path.name)
    np.testing.assert_array_equal(stored.read(), FLOATS[1:7].reshape(2, 3))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (tensor(0, (9,), (1,)), "reaches to number 8 of a storage of 8"),
        (tensor(8, (1,), (1,)), "reaches to number 8 of a storage of 8"),
        (tensor(0, (2, 2), (7, 1)), "reaches to number 8 of a storage of 8"),
        (tensor(0, (2,), (10**12,)), "reaches to number"),
        (tensor(-1, (2,), (1,)), "a tensor without storage, offset, sizes or strides"),
        (tensor(4, (2,), (-1,)), "a tensor without"),
        (tensor(0, (1,) * 33, (1,) * 33), "a tensor without"),
        (tensor(0, (2, 2), (1,)), "a tensor without"),
        (tensor(0, (1,), (1,), stored=number(3)), "a tensor without"),
        (tensor(0, (1,), (1,), storage(10**15)), "not 4000000000000000 bytes long"),
        (tensor(0, (1,), (1,), storage(-8)), "a storage without dtype, key or size"),
        (tensor(0, (1,), (1,), storage(kind=text("complex64"))), "a storage without dtype, key or size"),
        (tensor(0, (1,), (1,), storage(4, kind=name("torch", "HalfStorage"))), "not 8 bytes long"),
        (tensor(0, (1,), (1,), storage(key="../../x")), "no item named 'archive/data/../../x'"),
        (row(storage(8), tensor(0, (1,), (1,), storage(4))), "two accounts of storage '0'"),
    ],
)
def test_sizes_are_not_believed(path: Path, value: bytes, reason: str) -> None:
    archive(path, state(value))
    with pytest.raises(InputError, match="is not a whole PyTorch checkpoint") as caught:
        read_torch(path)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "target",
    [tensor(0, (2,), (1,)), storage(), name("torch._utils", "_rebuild_tensor_v2"), name("torch", "HalfStorage")],
)
@pytest.mark.parametrize(
    "attributes",
    [b"}" + text("shape") + numbers((10**6,)) + b"s", row(b"N", b"}" + text("shape") + numbers((10**6,)) + b"s")],
    ids=["dict", "slots"],
)
def test_checked_objects_cannot_be_changed(path: Path, target: bytes, attributes: bytes) -> None:
    """BUILD sets attributes; after the checks that would let a tensor reach beyond its storage."""
    archive(path, state(target + attributes + b"b"))
    with pytest.raises(InputError, match="is not a whole PyTorch checkpoint"):
        read_torch(path)


def test_a_huge_object_number_is_only_a_name(path: Path) -> None:
    archive(path, b"\x80\x02}r" + (2**31).to_bytes(4, "little") + b".")
    tracemalloc.start()
    assert read_torch(path) == {}
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


@pytest.mark.parametrize("member", ["data.pkl", "byteorder", "data/0"])
def test_compressed_archive(path: Path, member: str) -> None:
    archive(path, state(tensor(0, (1,), (1,))), packed=member)
    with pytest.raises(InputError, match=rf"'archive/{member}' is compressed"):
        read_torch(path)


@pytest.mark.parametrize(("member", "reason"), [("data.pkl", "Bad CRC-32"), ("data/0", "")])
def test_flipped_byte_of_the_program(path: Path, member: str, reason: str) -> None:
    archive(path, state(tensor(0, (1,), (1,))))
    with zipfile.ZipFile(path) as file:
        content = file.read(f"archive/{member}")
    whole = path.read_bytes()
    at = whole.index(content) + len(content) - 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    if reason:
        with pytest.raises(InputError, match=reason):
            read_torch(path)
    else:  # numbers are mapped, not read
        assert read_torch(path)["w"].shape == (1,)


def test_attributes_are_left_out(path: Path) -> None:
    """A state dict has some, such as `_metadata`; one named as a method must not be taken for it."""
    ordered = name("collections", "OrderedDict") + b")R"
    attributes = b"}" + text("items") + number(3) + b"s"
    archive(path, b"\x80\x02" + ordered + text("w") + tensor(0, (1,), (1,)) + b"s" + attributes + b"b.")
    assert read_torch(path)["w"].shape == (1,)


def test_items_as_python_2_wrote_them(path: Path) -> None:
    item = b"](" + text("w") + tensor(0, (1,), (1,)) + b"e"
    archive(path, b"\x80\x02" + name("collections", "OrderedDict") + b"](" + item + b"e\x85R.")
    assert read_torch(path)["w"].shape == (1,)


def test_numbers_to_be_negated_are_not_read_as_they_are(path: Path) -> None:
    hooks, metadata = name("collections", "OrderedDict") + b")R", b"}" + text("neg") + b"\x88s"
    view = row(storage(), number(0), numbers((1,)), numbers((1,)), b"\x89", hooks, metadata)
    archive(path, state(name("torch._utils", "_rebuild_tensor_v2") + view + b"R"))
    with pytest.raises(InputError, match="a tensor whose numbers are not as they are stored"):
        read_torch(path)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"0.", "the opcode POP"),
        (b"(N0.", "the opcode POP"),
        (b"\x85.", "takes more than it has made"),
        (b"N(\x85.", "takes more than it has made"),
        (b"N(Ns.", "takes more than it has made"),
        (b"NNa.", "a change of a NoneType"),
        (b"}Na.", "a change of a Pairs"),
        (b"](NNu.", "a change of a list"),
        (b"NN\x85R.", "a call of a NoneType"),
        (name("torch", "FloatStorage") + b")R.", "a call of a str"),
        (name("collections", "OrderedDict") + b"NR.", "a call of a function"),
        (b"}(Nu.", "is shorter"),
        (b"N", "pickle exhausted"),
        (b".", "pop from empty list"),
        (b"h\x05.", "5"),
        (b"\x00", "unknown"),
    ],
)
def test_programs_that_make_no_sense(path: Path, program: bytes, reason: str) -> None:
    archive(path, b"\x80\x02" + program)
    with pytest.raises(InputError, match="is not a whole PyTorch checkpoint") as caught:
        read_torch(path)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02" + tensor(0, (1,), (1,)) + b".", "holds a Tensor; expected a state dict"),
        (state(number(3)), "holds a int under 'w'; expected tensors: save model.state_dict"),
        (state(b"}"), "holds a dict under 'w'; expected tensors: save model.state_dict"),
    ],
)
def test_not_a_state_dict(path: Path, program: bytes, message: str) -> None:
    archive(path, program)
    with pytest.raises(InputError, match=message):
        read_torch(path)


def test_other_files(path: Path, tmp_path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 134695512\n")
    with pytest.raises(InputError, match="is not a whole PyTorch checkpoint"):
        read_torch(path)
    with tarfile.open(path, "w") as file:
        file.add(__file__, "storages")
    with pytest.raises(
        InputError, match=r"tar layout of torch 0\.1; expected a newer one: load and save it with torch"
    ):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "")
    with pytest.raises(InputError, match=r"no data\.pkl in the archive"):
        read_torch(path)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
def test_every_kind_of_tensor_is_what_torch_reads(torch: ModuleType, path: Path, new: bool, protocol: int) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds: dict[str, Callable[[], Any]] = {
        "whole": lambda: base,
        "transposed": base.t,
        "slice": lambda: base[1:3, 2:5],
        "steps": lambda: base[::2, ::3],
        "expanded": lambda: base[:1].expand(3, 6),
        "scalar": lambda: base[2, 3],
        "empty": lambda: base[:0],
        "half": base.half,
        "bfloat16": base.bfloat16,
        "integers": base.long,
        "parameter": lambda: torch.nn.Parameter(base + 1),
    }
    state = {kind: make() for kind, make in kinds.items()}
    torch.save(state, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    ours, theirs = read_torch(path), torch.load(path, weights_only=False)
    assert ours.keys() == theirs.keys()
    for kind, wanted in theirs.items():
        assert ours[kind].dtype == str(wanted.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(ours[kind].read().astype(np.float32), wanted.detach().float().numpy())
