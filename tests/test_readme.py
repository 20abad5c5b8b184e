"""What README.md says to type is understood, what it names is there, and its Python runs."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chai_jax.cli import parse
from chai_jax.data.toy import toy_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """All command lines of README.md that begin so, in blocks and in running text, as words."""
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in lines:
        line = re.split(r"\||; do|#", line.split("until ")[-1])[0].replace("[", "").replace("]", "")
        line = re.sub(r"^([A-Z]+=\S+ )+", "", line).replace("...", "")
        if line.startswith(program) and len(line.split()) > 2 - program.startswith("python"):  # more than a mention
            found.append(shlex.split(line))
    return found


@pytest.mark.parametrize("words", commands("chai-jax "), ids=" ".join)
def test_chai_jax_understands(words: list[str]) -> None:
    assert parse(words[1:]) is not None


@pytest.mark.parametrize("words", commands("python experiments/"), ids=" ".join)
def test_the_experiments_have_these_options(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / words[1]
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # which is not there after README's own commands
    monkeypatch.delitem(sys.modules, "chai_jax.measure.lm_eval", raising=False)
    before = set(sys.modules)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "lab":
            del sys.modules[name]
    assert stopped.value.code == 0
    options = capsys.readouterr().out
    assert all(word in options for word in words if word.startswith("--"))


def test_what_it_names_is_there() -> None:
    tree = next(block for kind, block in BLOCKS if not kind and block.startswith("chai_jax/"))
    folder, missing = "", []
    for line in tree.splitlines():
        if re.match(r"\S+/( |$)", line):
            folder = line.split()[0]
        for name in re.findall(r"[\w.-]+\.(?:py|sh|ipynb|css)\b|\b\w+/(?=\s)", line.strip()):
            missing += [name] if not any(ROOT.glob(f"{folder}/**/{name}")) and not (ROOT / name).exists() else []
    assert not missing
    paths = re.findall(r"`((?:experiments|chai_jax|tests)/[\w./-]+)`", README)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_its_shell_scripts_can_be_read() -> None:
    for script in ("tpu_setup.sh", "experiments/all.sh", "experiments/opt125m.sh"):
        assert f"bash {script}" in README or f"`{script}`" in README
        assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0


@pytest.mark.slow
def test_its_python_runs(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_model, "facebook/opt-125m")
    Path("data/sst2").mkdir(parents=True)
    for split, count in (("train", 1016), ("validation", 16)):
        rows = [json.dumps({"sentence": row["sentence"], "label": row["label"]}) for row in toy_rows(split, count)]
        Path(f"data/sst2/{split}.jsonl").write_text("\n".join(rows) + "\n")
    (code,) = (block for kind, block in BLOCKS if kind == "python")
    exec(compile(code, "README.md", "exec"), {})
    assert Path("out/model.safetensors").is_file()
