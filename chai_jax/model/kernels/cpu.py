"""cpu.cc and matrix_unit.cc for this machine: compiled once by the C++ compiler that is there, kept, known to XLA.

XLA's own programs for CPUs read keys, values and weights at half to two thirds of what memory gives, since their
products are made for many rows, and multiply float32 without the matrix unit (measured: README.md). Where no C++
compiler is found they are what computes.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path

import jax

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.cc", "matrix_unit.cc", "parallel.h")]
COMPILERS = ("c++", "g++", "clang++")
# Not -ffast-math, which would change how the whole process rounds.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
         "-shared", "-fPIC", "-w")  # fmt: skip
TARGETS = ("chai_jax_attention", "chai_jax_few_rows")
UNIT_TARGETS = ("chai_jax_many_rows",)  # on CPUs with a matrix unit alone
SECONDS = 120  # that compiling may take
_registered: set[str] = set()


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


def matrix_unit() -> bool:
    """Whether there are the kernels of CPUs with a matrix unit for bfloat16 (Intel's AMX)."""
    return available() and _registered.issuperset(UNIT_TARGETS)


@cache
def why_not() -> str:
    """Why there are no kernels, one line; empty where there are. The first call compiles them, a few seconds."""
    found = compiler()
    if not found:
        return f"no C++ compiler was found ({', '.join(COMPILERS)}, or what CXX names)"
    try:
        library = ctypes.CDLL(str(_built(*found)))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in said if "error" in line), said[0] if said else type(error).__name__)
        warnings.warn(f"{shlex.join(found)} made no kernels for this CPU, XLA computes: {reason}", stacklevel=2)
        return f"{shlex.join(found)} failed: {reason}"
    for name in (*TARGETS, *(UNIT_TARGETS if library.chai_jax_matrix_unit() else ())):
        _registered.add(name)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return ""


def _built(*compiler: str) -> Path:
    """The library, from the user's cache where it is there: of this source, compiler, jaxlib and kind of CPU.

    Raises:
        OSError, subprocess.SubprocessError: it could not be made.
    """
    flags = [*FLAGS, *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else [])]
    told = (
        *(source.read_text(encoding="utf-8") for source in SOURCES),
        *compiler,
        *flags,
        metadata.version("jaxlib"),
        _processor(),
    )
    name = f"cpu-{hashlib.sha256('|'.join(told).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chai_jax"
    if (folder / name).is_file():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        place = Path(tempfile.mkdtemp(dir=folder))
    except OSError:  # a home that cannot be written to: for this process alone
        folder = Path(tempfile.mkdtemp(prefix="chai_jax_"))
        place = Path(tempfile.mkdtemp(dir=folder))
    try:
        command = [*compiler, *flags, f"-I{jax.ffi.include_dir()}", *map(str, SOURCES[:-1]), "-o", str(place / name)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        return (place / name).replace(folder / name)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _processor() -> str:
    """What -march=native goes by: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
