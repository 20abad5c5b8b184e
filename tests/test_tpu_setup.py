"""tpu_setup.sh as far as it goes without a TPU: Pythons, pip, uv, sudo and chai-jax are stubs that write down calls."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tpu_setup.sh"
TOOLS = ("bash", "cat", "chmod", "cp", "dirname", "grep", "mkdir", "mktemp", "rm", "sed", "tee")

# One stub for all programs. A Python of a venv has pip; `old` in a Python's name says it is too old.
STUB = r"""#!/bin/bash
name=${0##*/}
echo "$name $*" >>"$STUBS/calls"
make_venv() {
    mkdir -p "$1/bin"
    cp "$0" "$1/bin/python"
    cp "$0" "$1/bin/chai-jax"
}
case "$name $*" in
    *" -c "*"3, 11"*) [ ! -e "$STUBS/old-$name" ] ;;
    *" -m venv --clear "*) [ ! -e "$STUBS/no-venv" ] && make_venv "${@: -1}" ;;
    "uv venv "*) [ ! -e "$STUBS/no-network" ] && make_venv "${@: -1}" ;;
    *"pip show --quiet libtpu-nightly") [ -e "$STUBS/nightly" ] ;;
    *"pip uninstall"*) rm "$STUBS/nightly" ;;
    "chai-jax env --require-backend "*) echo "platforms $JAX_PLATFORMS" >>"$STUBS/calls"
        echo "a table"; cat "$STUBS/devices" ;;
    "sudo "*) cat >/dev/null; exit 1 ;;
esac
"""


class Machine:
    """A folder with the script, and a PATH that holds the stubs and little else."""

    def __init__(self, root: Path):
        self.root, self.stubs = root / "repository", root / "stubs"
        for folder in (self.root, self.stubs, root / "bin"):
            folder.mkdir()
        shutil.copy(SCRIPT, self.root)
        self.environment = {"PATH": str(root / "bin"), "HOME": str(root), "STUBS": str(self.stubs)}
        self.environment["HUGEPAGES"] = str(self.stubs / "hugepages")
        self.have("TPU v3")
        for tool in TOOLS:
            (root / "bin" / tool).symlink_to(shutil.which(tool) or tool)
        for name in ("python3.12", "uv", "sudo"):
            self.install(name)

    def install(self, name: str) -> None:
        path = self.root.parent / "bin" / name
        path.write_text(STUB)
        path.chmod(0o755)

    def have(self, kind: str, count: int = 8, backend: str = "tpu") -> None:
        """What `chai-jax env` will print."""
        found = {"device": f"{count} x {kind} ({backend})", "processes": 1}
        (self.stubs / "devices").write_text(json.dumps(found) + "\n")

    def set_up(self, *argv: str, **variables: str) -> tuple[int, str, list[str]]:
        """Exit status, output, and the calls that the script made."""
        (self.stubs / "calls").write_text("")
        done = subprocess.run(
            ["bash", self.root / "tpu_setup.sh", *argv],
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout, (self.stubs / "calls").read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_bare_machine_is_set_up(machine: Machine) -> None:
    status, output, calls = machine.set_up()
    assert status == 0, output
    assert output.splitlines() == [
        "8 x TPU v3 (tpu)",
        "ready: .venv/bin/chai-jax run --require-backend tpu",
    ]
    assert "python3.12 -m venv --clear .venv" in calls
    assert "python -m pip install --quiet -e .[tpu]" in calls
    assert "platforms tpu,cpu" in calls


def test_a_second_time_keeps_what_is_there(machine: Machine) -> None:
    machine.set_up()
    (machine.root / ".venv" / "mine").touch()
    status, _, calls = machine.set_up()
    assert status == 0
    assert (machine.root / ".venv" / "mine").exists()
    assert not any("venv" in call or "uninstall" in call for call in calls)


def test_without_a_tpu_it_fails(machine: Machine) -> None:
    (machine.stubs / "devices").unlink()
    for argv in ((), ("--smoke",)):
        status, output, calls = machine.set_up(*argv)
        assert status == 1
        assert "no TPU to run on" in output
        assert "ready" not in output
        assert not any(call.startswith("chai-jax run") for call in calls)


def test_the_smoke_run_requires_the_tpu(machine: Machine) -> None:
    status, output, calls = machine.set_up("--smoke")
    assert status == 0, output
    (smoke,) = [call for call in calls if call.startswith("chai-jax run")]
    assert "--require-backend tpu --limit 32" in smoke


def test_a_rehearsal_needs_no_tpu(machine: Machine) -> None:
    """The same steps, but for the device, its library and its kernel's switch."""
    switch = machine.stubs / "hugepages"
    switch.write_text("always [madvise] never\n")
    machine.have("cpu", 1, "cpu")
    status, output, calls = machine.set_up("--small")
    assert status == 0, output
    assert output.splitlines()[-1] == "ready: .venv/bin/chai-jax run --require-backend cpu"
    assert "python -m pip install --quiet -e ." in calls
    assert "platforms cpu" in calls
    (job,) = [call for call in calls if call.startswith("chai-jax run")]
    assert "--require-backend cpu --limit 32 --max-steps 2" in job
    assert switch.read_text() == "always [madvise] never\n"
    machine.have("TPU v5 lite")
    shutil.rmtree(machine.root / ".venv")
    assert [call.split()[0] for call in machine.set_up("--smoke")[2]] == [call.split()[0] for call in calls]


def test_libtpu_nightly_goes_once(machine: Machine) -> None:
    (machine.stubs / "nightly").touch()
    removals = [sum("uninstall --quiet --yes libtpu-nightly libtpu" in call for call in machine.set_up()[2])]
    removals += [sum("uninstall" in call for call in machine.set_up()[2])]
    assert removals == [1, 0]


def test_an_old_python_is_passed_over_for_uv(machine: Machine) -> None:
    (machine.stubs / "old-python3.12").touch()
    status, output, calls = machine.set_up()
    assert status == 0, output
    assert "asking uv" in output
    assert "uv venv --quiet --clear --seed --python 3.12 .venv" in calls


def test_a_python_without_venv_and_no_network(machine: Machine) -> None:
    (machine.stubs / "no-venv").touch()
    (machine.stubs / "no-network").touch()
    status, output, _ = machine.set_up()
    assert status == 1
    assert "found no Python 3.11 or newer" in output
    status, output, _ = machine.set_up(PYTHON="python3.12")
    assert status == 1
    assert "PYTHON=python3.12 cannot make a venv" in output


def test_a_venv_of_an_old_python_is_made_anew(machine: Machine) -> None:
    machine.set_up()
    (machine.stubs / "old-python").touch()
    _, _, calls = machine.set_up()
    assert "python3.12 -m venv --clear .venv" in calls


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("TPU v5 lite", "always [madvise] never\n", "always\n"),
        ("TPU v6 lite", "always madvise [never]\n", "always\n"),
        ("TPU v5 lite", "[always] madvise never\n", "[always] madvise never\n"),
        ("TPU v4", "always [madvise] never\n", "always [madvise] never\n"),
    ],
)
def test_hugepages_from_v5e_on(machine: Machine, kind: str, before: str, after: str) -> None:
    switch = machine.stubs / "hugepages"
    switch.write_text(before)
    machine.have(kind)
    assert machine.set_up()[0] == 0
    assert switch.read_text() == after


def test_hugepages_that_cannot_be_switched_on_are_no_failure(machine: Machine) -> None:
    (machine.stubs / "hugepages").mkdir()  # cannot be written, whoever one is
    machine.have("TPU v5 lite")
    status, output, calls = machine.set_up()
    assert status == 0, output
    assert any(call.startswith("sudo -n tee") for call in calls)
    assert "could not switch on transparent hugepages" in output
    assert "Is a directory" not in output


def test_variables_that_hide_the_tpu_are_named(machine: Machine) -> None:
    status, output, calls = machine.set_up(JAX_PLATFORMS="cpu", TPU_LIBRARY_PATH="/old/libtpu.so")
    assert status == 0
    assert "JAX_PLATFORMS=cpu is ignored here" in output
    assert "TPU_LIBRARY_PATH=/old/libtpu.so is ignored here" in output
    assert "platforms tpu,cpu" in calls


def test_unknown_argument(machine: Machine) -> None:
    status, output, calls = machine.set_up("--fast")
    assert (status, calls) == (1, [])
    assert "unknown argument --fast" in output
