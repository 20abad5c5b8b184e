"""The public names: each can be imported, and type checkers are told the same."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import chai_jax


@pytest.mark.parametrize("name", sorted(chai_jax.HOMES))
def test_every_public_name_can_be_imported(name: str) -> None:
    found = getattr(chai_jax, name)
    # Classes and functions live where the table says; nothing is passed on from elsewhere.
    assert getattr(found, "__module__", f"chai_jax.{chai_jax.HOMES[name]}") == f"chai_jax.{chai_jax.HOMES[name]}"


def test_all_names_come_with_a_star() -> None:
    space: dict[str, object] = {}
    exec("from chai_jax import *", space)
    assert set(chai_jax.HOMES) == set(chai_jax.__all__) == set(space) - {"__builtins__"} == set(dir(chai_jax))
    assert space["Plan"] is importlib.import_module("chai_jax.plans.plan").Plan
    with pytest.raises(AttributeError, match="no attribute 'Plans'"):
        _ = chai_jax.Plans


def test_type_checkers_read_the_same_names() -> None:
    tree = ast.parse(Path(str(chai_jax.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.asname: node.module for node in block.body for alias in getattr(node, "names", ())}
    assert told == {name: f"chai_jax.{home}" for name, home in chai_jax.HOMES.items()}


@pytest.mark.slow
def test_mypy_sees_the_types(tmp_path: Path) -> None:
    """For users, who have `py.typed` and not our settings."""
    pytest.importorskip("mypy")
    lines = ["import chai_jax", *(f"reveal_type(chai_jax.{name})" for name in chai_jax.HOMES), "chai_jax.Plan.read(4)"]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"MYPYPATH": str(Path(__file__).parents[1])}
    )
    ours = [line for line in found.stdout.splitlines() if line.startswith("user.py")]
    notes = [line for line in ours if "Revealed type is" in line]
    assert len(notes) == len(chai_jax.HOMES)
    assert not [line for line in notes if '"Any"' in line]
    assert [line for line in ours if 'Argument 1 to "read" of "Plan" has incompatible type "int"' in line]
