"""The library of the kernels of CPUs: how it is compiled and kept, and when what is kept is not trusted."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from chai_jax.errors import InputError
from chai_jax.model import kernels
from chai_jax.model.kernels import cpu


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing compiled yet, in this process or on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.why_not.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu.why_not.cache_clear()


# Makes a "library" that everyone may write, says what it was told to, and counts.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then cat "$0.version"; exit; fi
for last; do :; done
echo made > "$last"
chmod 777 "$last"
case "$last" in *.so) echo once >> "$0.log"; cat "$0.says" >&2;; esac
"""


class Read(ctypes.CDLL):
    """A library that is read instead of loaded."""

    def __init__(self, path: str):
        self.text = Path(path).read_text(encoding="utf-8").strip()


@pytest.fixture
def stub(anew: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A compiler that makes libraries of one line; `loaded` is what the one line of the library is that is used."""
    path, folder = anew / "c++", anew / "chai_jax"
    path.write_text(COMPILER, encoding="utf-8")
    path.chmod(0o700)
    version, says, log = (path.with_suffix(suffix) for suffix in (".version", ".says", ".log"))
    version.write_text("12.2", encoding="utf-8")
    says.touch()
    monkeypatch.setattr(ctypes, "CDLL", Read)
    return SimpleNamespace(
        loaded=lambda: cpu._library((str(path),)).text,
        runs=lambda: len(log.read_text(encoding="utf-8").split()),
        kept=lambda: sorted(folder.iterdir()),
        folder=folder,
        version=version,
        says=says,
    )


def test_without_a_compiler_xla_decodes(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    here = jax.devices("cpu")[:1]
    assert kernels.choose_kernels("auto", here) == "xla"
    with pytest.raises(InputError, match=r"no kernels: no C\+\+ compiler was found .*; expected auto or xla"):
        kernels.check("native", here)
    assert not list(anew.rglob("*.so"))


def test_a_compiler_may_have_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.shutil, "which", lambda name: f"/bin/{name}" if name in ("ccache", "g++") else None)
    monkeypatch.setenv("CXX", "ccache clang++ -stdlib=libc++")
    assert cpu.compiler() == ("/bin/ccache", "clang++", "-stdlib=libc++")
    monkeypatch.setenv("CXX", " ")
    assert cpu.compiler() == ("/bin/g++",)
    for missing in ("icpx", "'g++"):
        monkeypatch.setenv("CXX", missing)
        assert cpu.compiler() == ()


def test_a_compiler_that_fails_is_told_of_and_xla_computes(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = anew / "c++"
    broken.write_text("#!/bin/sh\necho 'a.cc:1: error: no such flag' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match=r"made no kernels for this CPU, XLA computes: a\.cc:1: error: no such flag"):
        assert not cpu.available()
    assert list((anew / "chai_jax").iterdir()) == []  # nothing half made


def test_what_a_compiler_warns_of_is_shown(stub: SimpleNamespace) -> None:
    stub.says.write_text("a.cc:1: warning: unused variable", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"on the kernels for CPUs:\na\.cc:1: warning: unused variable"):
        assert stub.loaded() == "made"
    assert stub.loaded() == "made"  # once


def test_the_library_is_compiled_once(stub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process finds it; another kind of CPU does not, nor another version of the compiler."""
    assert stub.loaded() == stub.loaded() == "made"
    assert stub.runs() == 1
    stub.version.write_text("12.3", encoding="utf-8")
    stub.loaded()
    assert stub.runs() == 2
    monkeypatch.setattr(cpu, "_processor", lambda: "another")
    stub.loaded()
    assert stub.runs() == len(stub.kept()) == 3


def test_processes_that_start_together_compile_once(stub: SimpleNamespace) -> None:
    """The others wait for the first. (A descriptor of their own is as good as a process of their own.)"""
    stub.folder.mkdir(mode=0o700)
    with ThreadPoolExecutor(2) as pool:
        with cpu._alone(stub.folder):
            others = [pool.submit(stub.loaded) for _ in range(2)]
            with pytest.raises(TimeoutError):
                others[0].result(timeout=0.5)
        assert [other.result() for other in others] == ["made"] * 2
    assert stub.runs() == 1


def test_nobody_else_can_write_what_is_kept(stub: SimpleNamespace) -> None:
    before = os.umask(0)
    try:
        stub.loaded()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (stub.folder, *stub.kept())] == [0o700, 0o600]


def owned_by_another(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, os.getuid() + 12345, -1)


def linked_from_where_others_write(path: Path) -> None:
    elsewhere = path.parents[1] / "elsewhere"
    path.rename(elsewhere)
    elsewhere.chmod(0o777)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("part", ["folder", "file"])
@pytest.mark.parametrize(
    "spoil",
    [lambda path: path.chmod(0o770), lambda path: path.chmod(0o707), owned_by_another, linked_from_where_others_write],
    ids=["its group", "all", "another user", "a link"],
)
def test_what_others_can_write_is_not_loaded(stub: SimpleNamespace, spoil: Callable[[Path], None], part: str) -> None:
    """The library is made for this process alone, and nothing of it stays."""
    stub.loaded()
    (library,) = stub.kept()
    library.write_text("theirs", encoding="utf-8")
    spoil(stub.folder if part == "folder" else library)
    with pytest.warns(UserWarning, match="keeps no kernels .*belongs to another user, or others can write it"):
        assert stub.loaded() == "made"
    assert library.read_text(encoding="utf-8") == "theirs"


def test_what_is_loaded_is_what_was_looked_at(stub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can rename the folder around it may put another file in its place in between."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("files have no names but their paths here")
    stub.loaded()
    (library,) = stub.kept()

    def replaced(path: str) -> Read:
        stub.folder.rename(stub.folder.with_name("renamed"))
        stub.folder.mkdir()
        library.write_text("theirs", encoding="utf-8")
        return Read(path)

    monkeypatch.setattr(ctypes, "CDLL", replaced)
    assert stub.loaded() == "made"


@pytest.mark.parametrize("cache", ["file", "~/.cache"])
def test_a_home_that_cannot_be_written_to(
    stub: SimpleNamespace, cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file in the place of a folder; no home at all, whose folder would be one called ~."""
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if cache == "file" else cache)
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    with pytest.warns(UserWarning, match="keeps no kernels .*they are compiled anew for every process"):
        assert stub.loaded() == "made"
    assert not list(private.iterdir())
    assert not (tmp_path / "~").exists()


def test_a_damaged_library_is_made_anew(stub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.loaded()
    (library,) = stub.kept()
    library.write_text("dam", encoding="utf-8")

    def load(path: str) -> Read:
        found = Read(path)
        if found.text != "made":
            raise OSError("file too short")
        return found

    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.warns(UserWarning, match="keeps no kernels .file too short.*"):
        assert stub.loaded() == "made"


THROWS = """
#include "parallel.h"

#include <stdexcept>
#include <thread>
#include <vector>

struct Pool {
  bool full = false;
  std::vector<std::thread> threads;
  int64_t num_threads() const { return 3; }
  template <typename F>
  void Schedule(F&& f) {
    if (full) throw std::bad_alloc();
    threads.emplace_back(std::forward<F>(f));
  }
  ~Pool() {
    for (auto& thread : threads) thread.join();
  }
};

// How many of 3,000 runs came to their end; their number is odd where `InParallel` said that not all did.
int Ran(bool some_throw, bool full) {
  std::atomic<int> ran{0};
  Pool pool;
  pool.full = full;
  bool all = InParallel(pool, 3000, int64_t{1} << 40, [&](int64_t task) {
    if (some_throw && task % 3 == 0) throw std::runtime_error("no memory");
    ++ran;
  });
  return ran * 2 + !all;
}

int main() {
  return Ran(false, false) == 6000 && Ran(true, false) == 4001 && Ran(false, true) == 6000 && Ran(true, true) == 4001
             ? 0 : 1;
}
"""


@pytest.mark.skipif(not cpu.compiler(), reason="no C++ compiler")
def test_no_exception_leaves_a_thread_of_the_pool(tmp_path: Path) -> None:
    """All other runs come to their end, on this thread alone where there is no other, and the caller knows."""
    source, program = tmp_path / "throws.cc", tmp_path / "throws"
    source.write_text(THROWS, encoding="utf-8")
    headers = cpu.HEADERS[0].parent
    subprocess.run([*cpu.compiler(), "-std=c++17", "-pthread", f"-I{headers}", source, "-o", program], check=True)
    assert subprocess.run([program], timeout=60).returncode == 0
