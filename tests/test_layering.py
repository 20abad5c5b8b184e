"""Imports point one way, and each heavy library has one door; read from the source, so lazy ones count."""

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "chai_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From below to above; each imports from lines below its own alone.
ORDER = """
errors
config inputs stopping
console plans
machine
data
model
files
compress score
adapt analyse
sources
report serve
aot bench evaluation server
__init__
run
commands
cli
__main__
"""
LEVELS = {part: level for level, parts in enumerate(ORDER.split("\n")) for part in parts.split()}

# A library -> the only file or folder that may import it.
DOORS = {
    "flax": "model/flax_module.py",
    "gguf": "files/gguf/",
    "matplotlib": "report/figures/",
    "lm_eval": "evaluation/lm_eval.py",
    "tyro": "commands/",
    "torch": "bench/peers.py",
    "ctranslate2": "bench/peers.py",
    "starlette": "server/",
    "uvicorn": "server/",
    "prometheus_client": "server/",
    "httpx2": "bench/load_client.py",
}


def imports(source: str, package: str) -> Iterator[str]:
    """Every name that the text of a module of `package` imports, absolute: `from a.b import c` gives `a.b.c`.

    As deep as it is written, and by name: what calls `import_module` may mean each of its strings.
    """
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)
    called = {
        getattr(node, "attr", getattr(node, "id", "")) for node in nodes if isinstance(node, ast.Attribute | ast.Name)
    }
    if called & {"import_module", "__import__"}:
        for node in nodes:
            if isinstance(node, ast.Constant) and re.fullmatch(r"\w+(\.\w+)*", str(node.value)):
                ours = f"chai_jax.{str(node.value).removeprefix('chai_jax.')}"
                yield from [ours] if part(ours) != "__init__" else []
                yield from {str(node.value).split(".")[0]} & DOORS.keys()


def imports_of(path: Path) -> list[str]:
    return list(imports(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts)))


def part(name: str) -> str:
    """The top file or folder of chai_jax that holds the absolute `name`; `__init__` for its public names."""
    top = name.split(".")[1] if "." in name else "__init__"
    return top if (PACKAGE / top).is_dir() or (PACKAGE / f"{top}.py").is_file() else "__init__"


def label(source: Path) -> str:
    return source.relative_to(PACKAGE).as_posix()


def test_every_part_has_one_place() -> None:
    assert sorted(ORDER.split()) == sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES})


@pytest.mark.parametrize("source", SOURCES, ids=label)
def test_imports_point_one_way(source: Path) -> None:
    own = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
    ours = {name: part(name) for name in imports_of(source) if name.split(".")[0] == "chai_jax"}
    upward = [name for name, other in ours.items() if other != own and LEVELS[other] >= LEVELS[own]]
    assert upward == [], f"{label(source)} imports from beside or above itself"


def test_imports_are_seen_however_they_are_written() -> None:
    source = """
from chai_jax.plans.spec import Spec
from . import plans
from .files.store import load
HOMES = {"Plan": "bench.race", "Probe": "no.such.module"}
def late():
    import torch
    importlib.import_module(f"chai_jax.{HOMES[name]}")
    import_module("chai_jax.serve.generate").x
    import_module("flax.nnx")
"""
    assert set(imports(source, "chai_jax")) == {
        *("chai_jax.plans.spec.Spec", "chai_jax.plans", "chai_jax.files.store.load", "torch", "flax"),
        *("chai_jax.bench.race", "chai_jax.serve.generate"),
    }
    assert "chai_jax.bench.race" in imports_of(PACKAGE / "__init__.py")


@pytest.mark.parametrize("source", SOURCES, ids=label)
def test_heavy_libraries_have_one_door(source: Path) -> None:
    libraries = {name.split(".")[0] for name in imports_of(source)} & DOORS.keys()
    doors = {library: DOORS[library] for library in libraries}
    wrong = {library for library, door in doors.items() if not label(source).startswith(door)}
    assert not wrong, f"{label(source)} may not import these"


def test_what_is_imported_is_declared() -> None:
    """Each third-party import is a dependency of ours, not one of some dependency's that may go away."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["eval"] + extras["sinks"] + extras["peers"] + extras["gguf"]
    lines += extras["serve"]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    modules = {name.split(".")[0] for source in SOURCES for name in imports_of(source)}
    modules -= sys.stdlib_module_names | {"chai_jax"}
    providers = packages_distributions()
    undeclared = {
        module
        for module in modules
        if declared.isdisjoint(canonicalize_name(name) for name in providers.get(module, [module]))
    }
    assert not undeclared
