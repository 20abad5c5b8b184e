"""Reading pytorch_model.bin without torch, and without running what it says.

A PyTorch checkpoint is a pickle (a program) beside raw storages. The unpickler here knows the few names that a state
dict of tensors needs and refuses all others before anything is called. Storages are mapped, never copied, and every
size, offset and stride is checked against the file.

Two layouts are read: the zip archive (torch 1.6 and later) and the stream of pickles before it.
"""

import collections
import io
import os
import pickle
import pickletools
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from chai_jax.errors import InputError
from chai_jax.files.stored import Stored

STREAM_MAGIC = 0x1950A86A20F9469CFC6C
STREAM_VERSION = 1001
MOST_OBJECTS = 1 << 20  # in a pickle; a state dict has some ten for each tensor
DTYPES = {
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


class Storage(NamedTuple):
    """A run of `numel` numbers in the file. A tuple, as `Tensor` is: a pickle can set attributes of other objects."""

    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * jnp.dtype(self.dtype).itemsize


class Tensor(NamedTuple):
    """A strided view of a storage, checked to lie inside it; offset, sizes and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def map(self, path: Path, start: int) -> np.ndarray:
        """The tensor as a view of the mapped file, in which its storage begins at byte `start`."""
        dtype = jnp.dtype(self.storage.dtype)
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        flat = np.memmap(path, dtype, mode="r", offset=start, shape=(self.storage.numel,))
        strides = tuple(stride * dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


class _Call:
    """A function the pickle may call, without attributes that the pickle could set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _Unpickler(pickle.Unpickler):
    """Knows ordered dicts, tensors, parameters and storages; anything else is refused by name."""

    def __init__(self, file: io.BufferedReader | io.BytesIO, path: Path, known: dict[str, Storage]):
        super().__init__(file)
        self._path = path
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Call(_rebuild_tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Call(lambda data, requires_grad, hooks: data)
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise InputError(
            f"{self._path} imports {f'{module}.{name}'!r:.100}; weights need tensors only, so nothing of it was run: "
            "do not use it, or convert it to safetensors where you trust it"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or dtype not in DTYPES.values() or not isinstance(key, str) or not _is_count(numel):
            raise ValueError("a storage without dtype, key or size")
        new = Storage(key, dtype, numel)
        # A view (part of another storage, last entry) has not been written since torch 0.4.
        if any(view) or self._known.setdefault(key, new) != new:
            raise ValueError(f"two accounts of storage {key!r}")
        return new


def _unpickle(file: io.BufferedReader | io.BytesIO, path: Path, known: dict[str, Storage]) -> Any:
    """Load the pickle that begins here; the storages it names are added to `known`."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        # Python makes its table as long as the largest index, so that one flipped bit can ask for 64 GiB.
        if opcode.name.endswith("PUT") and (argument or 0) > MOST_OBJECTS:
            raise ValueError(f"object number {argument}")
    file.seek(start)
    return _Unpickler(file, path, known).load()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    sizes_fit = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if not (isinstance(storage, Storage) and sizes_fit and all(map(_is_count, (offset, *shape, *strides)))):
        raise ValueError("a tensor without storage, offset, sizes or strides")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise ValueError(f"a tensor that reaches to number {last} of a storage of {storage.numel}")
    return Tensor(storage, offset, shape, strides)


def read_torch(path: Path) -> dict[str, Stored]:
    """Open a PyTorch checkpoint that holds a state dict (str -> tensor).

    Raises:
        InputError: it imports anything beyond tensors; it is truncated or contradicts itself; it is in the tar layout
            of torch 0.1; it holds something else than a state dict.
    """
    try:
        if zipfile.is_zipfile(path):
            state, starts = _read_zip(path)
        elif tarfile.is_tarfile(path):
            raise InputError(
                f"{path} is in the tar layout of torch 0.1; expected a newer one: load and save it with torch"
            )
        else:
            state, starts = _read_stream(path)
    except InputError:
        raise
    # A hostile or cut pickle can raise nearly anything out of the unpickler.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} is not a whole PyTorch checkpoint ({reason}); expected a state dict as saved: fetch it again"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}; expected a state dict: save model.state_dict()")
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(
                f"{path} holds a {type(tensor).__name__} under {name!r:.80}; expected tensors: save model.state_dict()"
            )
        tensors[name] = Stored(tensor.shape, tensor.storage.dtype, path.name, _reader(path, tensor, starts))
    return tensors


def _reader(path: Path, tensor: Tensor, starts: dict[str, int]) -> Callable[[], np.ndarray]:
    return lambda: tensor.map(path, starts[tensor.storage.key])


def _read_zip(path: Path) -> tuple[Any, dict[str, int]]:
    """The state dict of a zip archive, and where in the file each storage begins."""
    known: dict[str, Storage] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        program = next((name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"), None)
        if program is None:
            raise ValueError("no data.pkl in the archive")
        root = program.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist():
            with archive.open(f"{root}byteorder") as order:
                if order.read(16) != b"little":
                    raise ValueError("numbers that are not little-endian")
        info = archive.getinfo(program)
        _member_start(file, info, info.file_size)
        state = _unpickle(io.BytesIO(archive.read(info)), path, known)
        starts = {}
        for key, storage in known.items():
            starts[key] = _member_start(file, archive.getinfo(f"{root}data/{key}"), storage.nbytes)
    return state, starts


def _member_start(file: io.BufferedReader, info: zipfile.ZipInfo, nbytes: int) -> int:
    """The first byte of a member's data, which must be stored as it is, `nbytes` long and inside the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != nbytes:
        raise ValueError(f"{info.filename} is compressed or not {nbytes} bytes long")
    file.seek(info.header_offset)
    header = file.read(30)  # the local file header; its last four bytes are the lengths of name and extra field
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"no header at {info.filename}")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + nbytes > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{info.filename} ends behind the file")
    return start


def _read_stream(path: Path) -> tuple[Any, dict[str, int]]:
    """The same of a stream: magic number, version, system, state dict and storage keys are pickled one after another.

    Then come the storages: each its length in elements as int64, then its numbers.
    """
    known: dict[str, Storage] = {}
    starts = {}
    with path.open("rb") as file:
        magic, version, _ = (_unpickle(file, path, known) for _ in range(3))
        if (magic, version) != (STREAM_MAGIC, STREAM_VERSION):
            raise ValueError("no PyTorch magic number")
        state = _unpickle(file, path, known)
        keys = _unpickle(file, path, known)
        if not isinstance(keys, list) or sorted(keys) != sorted(known):
            raise ValueError("the storages are not those of the tensors")
        size = os.fstat(file.fileno()).st_size
        for key in keys:
            numel = int.from_bytes(file.read(8), "little")
            starts[key] = file.tell()
            if numel != known[key].numel or file.seek(known[key].nbytes, os.SEEK_CUR) > size:
                raise ValueError(f"storage {key!r} is cut")
    return state, starts
