"""README.md, CONTRIBUTING.md and docs/: their commands are understood, what they name is there, their Python runs."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import chai_jax
from chai_jax.cli import parse
from chai_jax.data.toy import toy_rows

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SOURCES = ["chai_jax", "experiments", "tests", "docs"]
COMMANDS = ["run", "plan", "explain", "evaluate", "generate", "bench", "verify", "export", "lm-eval", "report", "aot"]
COMMANDS += ["env", "serve", "bench-serve"]


def blocks(page: str, kind: str) -> list[str]:
    """The code blocks of a page in this language."""
    return [code for language, code in BLOCK.findall(PAGES[page]) if language == kind]


def prose(page: str) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", PAGES[page])


def spans(page: str) -> list[str]:
    """The pieces of code in a page's running text and tables."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def typed() -> list[list[str]]:
    """All command lines of all pages, in blocks and in running text, as words; each once."""
    lines = []
    for page in PAGES:
        for code in blocks(page, "bash"):
            lines += code.replace("\\\n", " ").splitlines()
        lines += spans(page)
    found = {}
    for line in lines:
        line = re.split(r"\||; do|#|&&", line.split("until ")[-1])[0].replace("...", "")
        line = re.sub(r"^([A-Z]+=\S+ )+", "", line).removeprefix(".venv/bin/").strip()
        if line.split(" ")[0] in ("chai-jax", "python", "bash", *COMMANDS):
            found[line] = shlex.split(line)
    return list(found.values())


def lines_of(program: str) -> list[list[str]]:
    """The command lines of one program that are more than a mention of it."""
    least = {"chai-jax": 3, "python": 2, "bash": 2}[program]
    return [words for words in typed() if words[0] == program and len(words) >= least]


def listed(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The options that `--help` of a command lists."""
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))


@pytest.mark.parametrize("words", lines_of("chai-jax"), ids=" ".join)
def test_chai_jax_understands(words: list[str]) -> None:
    assert parse(words[1:]) is not None


def test_every_option_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Options named alone are some command's; those named behind a command are that one's."""
    options = {command: listed(command, capsys) for command in COMMANDS}
    missing = []
    for page in PAGES:
        for span in spans(page):
            first, *rest = span.split()
            known = options.get(first) or set.union(*options.values())
            if first in COMMANDS or first.startswith("-"):
                names = [word for word in (first, *rest) if re.match(r"--?[a-z]", word)]
                missing += [f"{page}: {span}" for name in names if name not in known]
    assert not missing


@pytest.mark.parametrize("command", ["run", "plan", "evaluate", "bench", "bench-serve", "export", "report"])
def test_what_is_written_goes_where_out_says(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"-o", "--out"} <= listed(command, capsys)


@pytest.mark.parametrize("words", [words for words in lines_of("python") if words[1] != "-m"], ids=" ".join)
def test_the_experiments_have_these_options(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / words[1]
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # which is not there after README's own commands
    monkeypatch.delitem(sys.modules, "chai_jax.evaluation.lm_eval", raising=False)
    before = set(sys.modules)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "lab":
            del sys.modules[name]
    assert stopped.value.code == 0
    options = capsys.readouterr().out
    assert all(word in options for word in words if word.startswith("--"))


@pytest.mark.parametrize("words", lines_of("bash"), ids=" ".join)
def test_its_shell_scripts_can_be_read(words: list[str]) -> None:
    script = ROOT / words[1]
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert all(word in script.read_text(encoding="utf-8") for word in words[2:])


def test_its_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = set(",".join(re.findall(r"\.\[([\w,]+)\]", "".join(PAGES.values()))).split(","))
    assert asked >= {"cuda", "tpu", "eval", "peers", "test", "dev"}
    assert asked <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("page", PAGES)
def test_what_it_names_is_there(page: str) -> None:
    """Paths from the root; bare names of scripts; the parts of the package in CONTRIBUTING.md's table."""
    names = [name.rstrip("/") for name in spans(page)]
    paths = [name for name in names if re.fullmatch(rf"({'|'.join(SOURCES)})/[\w./+-]+", name)]
    scripts = [name for name in names if re.fullmatch(r"\w+\.(py|sh|ipynb)", name)]
    missing = [path for path in paths if not (ROOT / path).exists()]
    missing += [
        name
        for name in scripts
        if not (ROOT / name).exists() and not any(any((ROOT / part).rglob(name)) for part in SOURCES)
    ]
    if page == "CONTRIBUTING.md":
        rows = re.search(r"^\| part of `chai_jax/`.*?\n\n", PAGES[page], re.MULTILINE | re.DOTALL)
        assert rows
        parts = re.findall(r"`([\w./]+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", rows[0], re.MULTILINE)))
        assert len(parts) > 10
        missing += [part for part in parts if not (ROOT / "chai_jax" / part).exists()]
        here = {path.name for path in (ROOT / "chai_jax").iterdir() if path.suffix == ".py" or path.is_dir()}
        missing += sorted(here - {part.rstrip("/") for part in parts} - {"__init__.py", "__pycache__"})
    assert not missing


def anchors(text: str) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_somewhere(page: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        known = anchors(goal.read_text(encoding="utf-8")) if anchor and goal.is_file() else set()
        broken += [target] if not goal.exists() or (anchor and anchor not in known) else []
    assert not broken


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {f"docs/{name}" for name in re.findall(r"\]\(docs/([\w/-]+\.md)", PAGES["README.md"])}
    linked |= {f"docs/{name}" for name in re.findall(r"\]\((results/[\w.-]+)", PAGES["docs/results.md"])}
    assert linked | {"README.md", "CONTRIBUTING.md", "docs/README.md"} == PAGES.keys()


def test_tables_are_as_the_results_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `experiments/draw_tables.py` would draw, and nothing else, stands between its comments."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    drawn = runpy.run_path(str(ROOT / "experiments" / "draw_tables.py"))["drawn"]
    stale = [page for page, text in PAGES.items() if drawn(text) != text]
    assert not stale
    changed = drawn("<!-- drawn: redundancy -->\nold\n<!-- end -->\n")
    assert "old" not in changed
    assert "| 0 to 4 |" in changed


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 250


def test_the_public_names_are_those_of_the_package() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", PAGES["docs/python.md"], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(chai_jax.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_its_python_runs(page: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_model, "facebook/opt-125m")
    Path("data/sst2").mkdir(parents=True)
    for split, count in (("train", 1016), ("validation", 16)):
        rows = [json.dumps({"sentence": row["sentence"], "label": row["label"]}) for row in toy_rows(split, count)]
        Path(f"data/sst2/{split}.jsonl").write_text("\n".join(rows) + "\n")
    code = blocks(page, "python")
    assert code
    exec(compile("".join(code), page, "exec"), {})
    assert page != "README.md" or Path("out/model.safetensors").is_file()
