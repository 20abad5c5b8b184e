"""Reading pytorch_model.bin without torch, and without running what it says.

A PyTorch checkpoint is a pickle (a program) beside raw storages. The few names that a state dict of tensors needs are
known here, and all others are refused before anything is called. Storages are mapped, never copied, and every size,
offset and stride is checked against the file.

Two layouts are read: the zip archive (torch 1.6 and later) and the stream of pickles before it.
"""

import io
import math
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from chai_jax.errors import InputError
from chai_jax.files.stored import MOST_AXES, Stored
from chai_jax.files.unpickle import MOST_PICKLE_BYTES, Limited, Pairs, unpickle
from chai_jax.inputs.reading import open_regular, reason, shown

ZIP_MAGIC = b"PK\x03\x04"
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
STREAM_MAGIC = 0x1950A86A20F9469CFC6C
STREAM_VERSION = 1001
MOST_CHARACTERS = 1000  # of a tensor's name or a storage's key
# Tensors may share storages and repeat numbers (tied or expanded ones do), but not so that a small file fills the
# memory: together they may have this many times the file's bytes, and some more that do no harm.
SHARED, SHARED_BYTES = 4, 1 << 26
STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class TorchStorage(NamedTuple):
    """A run of `numel` numbers in the file."""

    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * jnp.dtype(self.dtype).itemsize


class Tensor(NamedTuple):
    """A strided view of a storage, checked to lie inside it; offset, sizes and strides count elements."""

    storage: TorchStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers, those that it repeats included."""
        return math.prod(self.shape) * jnp.dtype(self.storage.dtype).itemsize

    def map(self, path: Path, start: int) -> np.ndarray:
        """The tensor as a view of the mapped file, in which its storage begins at byte `start`."""
        dtype = jnp.dtype(self.storage.dtype)
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        flat = np.memmap(path, dtype, mode="r", offset=start, shape=(self.storage.numel,))
        strides = tuple(stride * dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _are_counts(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MOST_AXES and all(map(_is_count, value))


def _ordered(items: Any = ()) -> Pairs:
    """`OrderedDict`. Python 2 gave it its items as a list: they are moved, lest one list be copied a million times."""
    pairs = Pairs((key, value) for key, value in items)
    if pairs:
        items.clear()
    return pairs


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, metadata: Any = None
) -> Tensor:
    sizes_fit = _are_counts(shape) and _are_counts(strides) and len(shape) == len(strides)
    if not (isinstance(storage, TorchStorage) and _is_count(offset) and sizes_fit):
        raise ValueError("a tensor without storage, offset, sizes or strides")
    if metadata:  # it would say that the numbers are to be negated or conjugated
        raise ValueError("a tensor whose numbers are not as they are stored")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise ValueError(f"a tensor that reaches to number {last} of a storage of {storage.numel}")
    return Tensor(storage, offset, shape, strides)


def _rebuild_with_attributes(function: Any, kind: Any, arguments: Any, _attributes: Any) -> Tensor:
    if function is not _rebuild_tensor or kind != "Tensor" or type(arguments) is not tuple:
        raise ValueError("an object of a class of its own")
    return _rebuild_tensor(*arguments)


KNOWN_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch", "Tensor"): "Tensor",
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, _grad, _hooks: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, _grad, _hooks, _attributes: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
    **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()},
}


def _find(path: Path, module: str, name: str) -> Any:
    if (module, name) not in KNOWN_GLOBALS:
        raise InputError(
            f"{shown(path)} imports {f'{module}.{name}'!r:.100}; weights need tensors only, so nothing of it was run: "
            "do not use it, or convert it to safetensors where you trust it"
        )
    return KNOWN_GLOBALS[module, name]


def _storage(known: dict[str, TorchStorage], pid: Any) -> TorchStorage:
    """The storage of a persistent id; it is added to those that are `known`."""
    if type(pid) is not tuple or len(pid) not in (5, 6):
        raise ValueError("a storage without dtype, key or size")
    kind, dtype, key, _, numel, *view = pid
    if kind != "storage" or dtype not in STORAGE_DTYPES.values() or not _is_name(key) or not _is_count(numel):
        raise ValueError("a storage without dtype, key or size")
    new = TorchStorage(key, dtype, numel)
    # A view (part of another storage, last entry) has not been written since torch 0.4.
    if any(view) or known.setdefault(key, new) != new:
        raise ValueError(f"two accounts of storage {key!r}")
    return new


def _is_name(value: Any) -> bool:
    return type(value) is str and len(value) <= MOST_CHARACTERS


def read_torch(path: Path) -> dict[str, Stored]:
    """Open a PyTorch checkpoint that holds a state dict (str -> tensor).

    Raises:
        InputError: it imports anything beyond tensors; it is truncated or contradicts itself; it is in the tar layout
            of torch 0.1; it holds something else than a state dict; its tensors are far larger than the file.
    """
    known: dict[str, TorchStorage] = {}
    try:
        with open_regular(path) as whole:
            size = os.fstat(whole.fileno()).st_size
            begin = whole.read(TAR_MAGIC_AT + len(TAR_MAGIC))
            whole.seek(0)
            if begin[TAR_MAGIC_AT:] == TAR_MAGIC:
                raise InputError(
                    f"{shown(path)} is in the tar layout of torch 0.1; expected a newer one: load and "
                    "save it with torch"
                )
            read = _read_zip if begin.startswith(ZIP_MAGIC) else _read_stream
            load = partial(unpickle, find=partial(_find, path), persistent=partial(_storage, known))
            state, starts = read(Limited(whole, MOST_PICKLE_BYTES), size, load, known)
    except InputError:
        raise
    # A hostile or cut pickle can raise nearly anything.
    except Exception as error:
        raise InputError(
            f"{shown(path)} is not a whole PyTorch checkpoint ({reason(error):.200}); expected a state dict as saved: "
            "fetch it again"
        ) from None
    tensors = _state_dict(path, state)
    asked = sum(tensor.nbytes for tensor in tensors.values())
    if asked > SHARED * size + SHARED_BYTES:
        raise InputError(
            f"{shown(path)} holds tensors of {asked:,} bytes in a file of {size:,}; expected one that holds its own "
            "numbers: do not use it, or save contiguous copies of its tensors"
        )
    return {
        name: Stored(
            tensor.shape, tensor.storage.dtype, path.name, partial(tensor.map, path, starts[tensor.storage.key])
        )
        for name, tensor in tensors.items()
    }


def _state_dict(path: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Pairs):
        raise InputError(f"{shown(path)} holds a {_kind(state)}; expected a state dict: save model.state_dict()")
    for name, tensor in state:
        if not _is_name(name) or not isinstance(tensor, Tensor):
            shape = f"{name!r:.80}" if _is_name(name) else f"a {_kind(name)} as name"
            raise InputError(
                f"{shown(path)} holds a {_kind(tensor)} under {shape}; expected tensors: save model.state_dict()"
            )
    return dict(state)


def _kind(value: Any) -> str:
    return "dict" if isinstance(value, Pairs) else type(value).__name__


Load = Callable[[Limited], Any]


def _read_zip(file: Limited, size: int, load: Load, known: dict[str, TorchStorage]) -> tuple[Any, dict[str, int]]:
    """The state dict of a zip archive of `size` bytes, and where in the file each storage begins."""
    with zipfile.ZipFile(file) as archive:
        program = next((name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"), None)
        if program is None:
            raise ValueError("no data.pkl in the archive")
        root = program.removesuffix("data.pkl")

        def read(name: str) -> bytes:
            _member_start(file, size, archive.getinfo(name))
            return archive.read(name)  # checks its sum, too

        if f"{root}byteorder" in archive.NameToInfo and read(f"{root}byteorder") != b"little":
            raise ValueError("numbers that are not little-endian")
        state = load(Limited(io.BytesIO(read(program)), MOST_PICKLE_BYTES))
        starts = {
            key: _member_start(file, size, archive.getinfo(f"{root}data/{key}"), storage.nbytes)
            for key, storage in known.items()
        }
    return state, starts


def _member_start(file: Limited, size: int, info: zipfile.ZipInfo, nbytes: int | None = None) -> int:
    """The first byte of a member's data, which must be stored as it is, `nbytes` long if given, inside the file."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename!r} is compressed")
    if nbytes not in (None, info.file_size):
        raise ValueError(f"{info.filename!r} is not {nbytes} bytes long")
    file.seek(info.header_offset)
    header = file.read(30)  # the local file header; its last four bytes are the lengths of name and extra field
    if header[:4] != ZIP_MAGIC:
        raise ValueError(f"no header at {info.filename!r}")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > size:
        raise ValueError(f"{info.filename!r} ends behind the file")
    return start


def _read_stream(file: Limited, size: int, load: Load, known: dict[str, TorchStorage]) -> tuple[Any, dict[str, int]]:
    """The same of a stream: magic number, version, system, state dict and storage keys are pickled one after another.

    Then come the storages: each its length in elements as int64, then its numbers.
    """
    starts = {}
    magic, version, _ = (load(file) for _ in range(3))
    if (magic, version) != (STREAM_MAGIC, STREAM_VERSION):
        raise ValueError("no PyTorch magic number")
    state = load(file)
    keys = load(file)
    if type(keys) is not list or not all(map(_is_name, keys)) or sorted(keys) != sorted(known):
        raise ValueError("the storages are not those of the tensors")
    for key in keys:
        numel = int.from_bytes(file.read(8), "little")
        starts[key] = file.tell()
        if numel != known[key].numel or file.seek(known[key].nbytes, os.SEEK_CUR) > size:
            raise ValueError(f"storage {key!r} is cut")
    return state, starts
