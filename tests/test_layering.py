"""Imports point one way, and each heavy library has one door; read from the source, so lazy ones count."""

import ast
import importlib.util
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

# From below to above; what shares a line may import each other.
ORDER = """
errors progress processes peaks stopping canaries
reading fields
config spec data
plans
model files
compress
score
analyse
adapt
serve
measure
report
environment devices run_folder sinks work
planning stages
pipeline
__init__
commands
cli
__main__
"""
LEVELS = {part: level for level, parts in enumerate(ORDER.split("\n")) for part in parts.split()}

# A library -> the only file or folder that may import it.
DOORS = {
    "flax": "model/",
    "matplotlib": "report/figures/",
    "lm_eval": "measure/lm_eval.py",
    "torch": "measure/peers.py",
    "ctranslate2": "measure/peers.py",
}


def imports(source: Path) -> Iterator[str]:
    """Every name `source` imports, absolute, as deep as it is written: `from a.b import c` gives `a.b.c`."""
    package = ".".join(source.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """The top file or folder of chai_jax that holds the absolute `name`; `__init__` for its public names."""
    top = name.split(".")[1] if "." in name else "__init__"
    return top if (PACKAGE / top).is_dir() or (PACKAGE / f"{top}.py").is_file() else "__init__"


def label(source: Path) -> str:
    return source.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("source", SOURCES, ids=label)
def test_imports_point_one_way(source: Path) -> None:
    own = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LEVELS, f"{own} has no place in the order of imports: give it one"
    ours = [name for name in imports(source) if name.split(".")[0] == "chai_jax"]
    upward = [name for name in ours if LEVELS.get(part(name), 0) > LEVELS[own]]
    assert not upward, f"{label(source)} imports from above itself"


@pytest.mark.parametrize("source", SOURCES, ids=label)
def test_heavy_libraries_have_one_door(source: Path) -> None:
    libraries = {name.split(".")[0] for name in imports(source)} & DOORS.keys()
    doors = {library: DOORS[library] for library in libraries}
    wrong = {library for library, door in doors.items() if not label(source).startswith(door)}
    assert not wrong, f"{label(source)} may not import these"


def test_what_is_imported_is_declared() -> None:
    """Each third-party import is a dependency of ours, not one of some dependency's that may go away."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["eval"] + extras["sinks"] + extras["peers"]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    modules = {name.split(".")[0] for source in SOURCES for name in imports(source)}
    modules -= sys.stdlib_module_names | {"chai_jax"}
    providers = packages_distributions()
    undeclared = {
        module
        for module in modules
        if declared.isdisjoint(canonicalize_name(name) for name in providers.get(module, [module]))
    }
    assert not undeclared
