"""The C++ files here for this machine: compiled once by the compiler that is there, kept, and known to XLA.

XLA's own programs for CPUs read keys, values and weights at half to two thirds of what memory gives, since their
products are made for many rows (measured: docs/performance.md). Where no C++ compiler is found they are what computes.

A library is code: what is kept is loaded only from a folder and a file that nobody but the user can write.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import jax

from chai_jax.inputs.reading import reason, shown

SOURCES = [
    Path(__file__).with_name(name) for name in ("decode_cpu.cc", "decode_blocks.cc", "products_cpu.cc", "write_cpu.cc")
]
HEADERS = [
    Path(__file__).with_name(name)
    for name in ("checks.h", "few_bits.h", "int4.h", "parallel.h", "softmax.h", "vectors.h")
]
COMPILERS = ("c++", "g++", "clang++")
# Not -ffast-math, which would change how the whole process rounds.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
         "-shared", "-fPIC", "-Wall", "-Wextra")  # fmt: skip
TARGETS = (
    "chai_jax_attention",
    "chai_jax_attention_few_bits",
    "chai_jax_attention_int4",
    "chai_jax_few_rows",
    "chai_jax_put_tokens",
)
SECONDS = 300  # that compiling may take: some 10 of idle cores, and others may compute too


def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: what CXX says ("ccache g++"), or the first of `COMPILERS`; () if not there."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # a quotation without an end: no command
        return ()
    commands = [named] if named else [[name] for name in COMPILERS]
    return next(((found, *rest) for first, *rest in commands if (found := shutil.which(first))), ())


def available() -> bool:
    """Whether programs traced here may use the kernels: they are compiled, and XLA knows them."""
    return not why_not()


@cache
def why_not() -> str:
    """Why there are no kernels, one line; empty where there are. The first call compiles them, some 10 seconds."""
    found = compiler()
    if not found:
        return f"no C++ compiler was found ({', '.join(COMPILERS)}, or what CXX names)"
    try:
        library = _library(found)
    except (OSError, subprocess.SubprocessError) as error:
        why = _said(error)
        warnings.warn(f"{shlex.join(found)} made no kernels for this CPU, XLA computes: {why}", stacklevel=2)
        return f"{shlex.join(found)} failed: {why}"
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return ""


def _said(error: OSError | subprocess.SubprocessError) -> str:
    """The compiler's first line about an error; of one that ended without a word or in time, what became of it."""
    text = getattr(error, "stderr", None)
    lines = text.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) and text else []
    return next((line for line in lines if "error" in line), lines[0] if lines else reason(error))


def _library(compiler: tuple[str, ...]) -> ctypes.CDLL:
    """The library: from the user's cache folder, where it is kept, or else made for this process alone.

    Raises:
        OSError, subprocess.SubprocessError: it could not be made.
    """
    name = f"cpu-{_key(compiler)}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "chai_jax"
    try:
        if not folder.is_absolute():
            raise FileNotFoundError("not an absolute path")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(folder):
            if not (folder / name).exists():
                _compile(compiler, folder / name)
        return _loaded(folder / name)
    except OSError as error:  # not to be written, or by others too; damaged; a file system that runs no code
        kept = f"{shown(folder)} keeps no kernels ({reason(error)})"
        warnings.warn(f"{kept}: they are compiled anew for every process; expected a folder of yours", stacklevel=3)
        with tempfile.TemporaryDirectory(prefix="chai_jax_") as private:
            _compile(compiler, Path(private) / name)
            return _loaded(Path(private) / name)


def _key(compiler: tuple[str, ...]) -> str:
    """Of all that decides what the library does: source, compiler and its version, flags, jaxlib and kind of CPU."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=SECONDS, check=False).stdout
    told = (
        *(source.read_bytes() for source in SOURCES + HEADERS),
        version,
        *(part.encode() for part in (*compiler, *_flags(), metadata.version("jaxlib"), _processor())),
    )
    return hashlib.sha256(b"|".join(told)).hexdigest()[:16]


def _flags() -> list[str]:
    return [*FLAGS, *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else [])]


def _compile(compiler: tuple[str, ...], library: Path) -> None:
    """Make the library, whole or not at all; what the compiler warns of is shown."""
    place = Path(tempfile.mkdtemp(dir=library.parent))
    try:
        made, parts = place / library.name, [place / f"{source.stem}.o" for source in SOURCES]
        # jaxlib's headers are a system's: of them nothing is warned.
        how = (*compiler, *_flags(), "-isystem", jax.ffi.include_dir())
        commands = [(*how, "-c", str(source), "-o", str(part)) for source, part in zip(SOURCES, parts, strict=True)]
        with ThreadPoolExecutor(len(commands)) as pool:
            said = list(pool.map(_run, commands))
        said.append(_run((*compiler, *_flags(), *map(str, parts), "-o", str(made))))
        if text := "\n".join(filter(None, said)):
            warnings.warn(f"{shlex.join(compiler)} on the kernels for CPUs:\n{text}", stacklevel=2)
        made.chmod(0o600)  # whatever the umask
        made.replace(library)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time compiles into the folder, where its file system has locks: the next finds what it made."""
    handle = _opened(folder)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _run(command: Sequence[str]) -> str:
    """What a command complains of.

    Raises:
        OSError, subprocess.SubprocessError: it failed.
    """
    done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    return done.stderr.strip()


def _opened(path: Path) -> int:
    """A descriptor of a file or folder that belongs to the user, and that nobody else can write.

    Raises:
        OSError: it cannot be opened, or is not so.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(handle)
    if found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return handle
    os.close(handle)
    raise PermissionError(f"{shown(path.name)} belongs to another user, or others can write it")


def _loaded(library: Path) -> ctypes.CDLL:
    """A library of ours: the very file that was looked at, where the system can name it, whatever its path says by now.

    Its descriptor stays open, since libraries are told apart by name, and this name must not come again.
    """
    handle = _opened(library)
    same = Path(f"/proc/self/fd/{handle}")
    return ctypes.CDLL(str(same if same.exists() else library))


def _processor() -> str:
    """What -march=native goes by: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
