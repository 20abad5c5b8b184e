"""A task of a person's own, described by a file: the harness asks the same; every way it can be wrong has one line."""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from chai_jax.data.multiple_choice import MOST_CHOICES, MultipleChoice, Row, render
from chai_jax.data.tasks import get_task, get_tasks, load_rows
from chai_jax.errors import InputError

ROWS: list[Row] = [
    {"story": "It rains . ", "ends": ["The street is wet .", "été"], "right": 0, "mood": "sad", "n": 1},
    {"story": '{{mood}} {% x %} "q" <b>&amp;\\n', "ends": ["a", "b {{story}}", "電影"], "right": 2, "mood": "happy"},
    {"story": "two\nlines\n", "ends": [" a", "b "], "right": 1, "mood": "sad", "n": None},
]
PLAIN = "context: '{{story}}'\nchoices: ends\ngold: right\nvalidation: rows.jsonl\n"


def described(folder: Path, text: str = PLAIN, rows: Any = ROWS, name: str = "own.yaml") -> str:
    """The path of a task file beside its rows."""
    (folder / name).write_text(text, encoding="utf-8")
    lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    return str(folder / name)


# A task file of ours, and what the harness calls the same (its doc_to_text, doc_to_choice, doc_to_target, ...).
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "a list, a number": (PLAIN, {"doc_to_text": "{{story}}", "doc_to_choice": "{{ends}}", "doc_to_target": "right"}),
    "templates, a text": (
        "context: |\n  Story: {{story}}\n  { {{ mood }}?\nchoices: [sad, '{{mood}}', \"no {{story}}\"]\n"
        "gold: '{{mood}}'\ndelimiter: ' -> '\nnormalise: bytes\nvalidation: rows.jsonl",
        {
            "doc_to_text": "Story: {{story}}\n{ {{ mood }}?\n",
            "doc_to_choice": "{{['sad', mood, 'no ' ~ story]}}",
            "doc_to_target": "{{mood}}",
            "target_delimiter": " -> ",
        },
    ),
    "no context": (
        "context: ''\nchoices: ['{{story}}', '{{mood}}']\ngold: zero\ndelimiter: ''\nvalidation: rows.jsonl",
        {
            "doc_to_text": "",
            "doc_to_choice": "{{[story, mood]}}",
            "doc_to_target": "zero",
            "target_delimiter": "",
        },
    ),
    "words that YAML takes for something else": (
        "context: '{{story}}'\nchoices: [yes, no, 1.0, null]\ngold: right\nvalidation: rows.jsonl",
        {"doc_to_text": "{{story}}", "doc_to_choice": ["yes", "no", "1.0", "null"], "doc_to_target": "right"},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_the_harness_asks_the_same(case: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    text, theirs = SAME[case]
    rows = [{**row, "zero": 0} for row in ROWS]
    task = get_task(described(tmp_path, text, rows))
    ours = [task.question(row) for row in load_rows(task, "validation")]
    config = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "rows.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}],
        **theirs,
    }
    harness = ConfigurableTask(config=config)
    harness.build_all_requests(rank=0, world_size=1)
    asked = [(one.doc_id, *one.args) for one in harness.instances]
    assert asked == [(at, one.context, choice) for at, one in enumerate(ours) for choice in one.choices]
    answers = [harness.doc_to_target(row) for row in rows]
    choices = [harness.doc_to_choice(row) for row in rows]
    numbers = [own.index(one) if isinstance(one, str) else one for one, own in zip(answers, choices, strict=True)]
    assert numbers == [one.label for one in ours]


def test_what_a_file_says(tmp_path: Path) -> None:
    path = described(tmp_path, PLAIN + "name: stories-2\nnormalise: tokens\ntrain: rows.jsonl\n", name="x.yml")
    task = get_task(path)
    assert (task.name, task.normalise, task.columns) == ("stories-2", "tokens", ("story",))
    content = (tmp_path / "x.yml").read_bytes()
    assert task.about == {"task_file": path, "task_sha256": hashlib.sha256(content).hexdigest()}
    assert load_rows(task, "train", limit=2) == ROWS[:2]
    assert get_task(described(tmp_path)).name == "own"
    assert get_task("sst2").about == {}


def test_rows_are_in_the_data_folder_or_beside_the_file(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "home").mkdir()
    task = get_task(described(tmp_path / "home"))
    assert load_rows(task, "validation", other) == ROWS
    (other / "rows.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    assert load_rows(task, "validation", other) == ROWS[1:2]
    assert load_rows(task, "validation") == ROWS
    (tmp_path / "home/rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"home/rows\.jsonl is missing; expected the validation rows that .*own\.yaml"):
        load_rows(task, "validation")
    with pytest.raises(InputError, match=r"own\.yaml names no train rows; expected a line such as train: rows\.jsonl"):
        load_rows(task, "train")


def test_several_with_commas(tmp_path: Path) -> None:
    path = described(tmp_path)
    assert [task.name for task in get_tasks("--task", f"sst2, {path},")] == ["sst2", "own"]
    with pytest.raises(InputError, match="--task has two tasks called own; expected each once"):
        get_tasks("--task", f"{path},{path}")
    with pytest.raises(
        InputError, match=r"--task is ' , '; expected sst2, rte, piqa, hellaswag, toy, or files NAME\.yaml"
    ):
        get_tasks("--task", " , ")


def test_templates_run_nothing() -> None:
    row = {"a": "{{b}} {{a}} {% for x in y %}", "b": "never"}
    assert render("{{a}} {a} {0.__class__} ${b} %(b)s", row) == f"{row['a']} {{a}} {{0.__class__}} ${{b}} %(b)s"


# Lines of PLAIN (or the whole, where it begins with =) replaced, and what the message says.
BAD_FILES: dict[str, tuple[str, str]] = {
    "unknown key": ("doc_to_text: x", r"has an unknown field 'doc_to_text'; expected some of context, choices, gold"),
    "no context": ("=choices: ends\nvalidation: rows.jsonl", "has no context; expected context, choices"),
    "no choices": ("=context: '{{a}}'\nvalidation: rows.jsonl", "has no choices; expected context, choices"),
    "a list for a text": ("gold: [a]", r"\.gold is \['a'\]; expected a string"),
    "a template without quotes": (
        "context: {{story}}",
        r"cannot be read \(line 1: a key is no text: a value that begins with \{ .* quotes\)",
    ),
    "a mapping for a list": ("choices: {a: b}", r"\.choices is \{'a': 'b'\}; expected a list"),
    "a list of lists": ("choices: [[a], b]", r"\.choices\[0\] is \['a'\]; expected a string"),
    "another norm": ("normalise: words", r"\.normalise is 'words'; expected one of none, characters, bytes, tokens"),
    "no column": ("context: story", r"has context 'story', which names no column; expected \{\{column\}\} in it"),
    "no column anywhere": ("=context: ''\nchoices: [a, b]\ntrain: x", "has context '', which names no column"),
    "one choice": ("choices: [a]", r"has choices \('a',\); expected 2 to 256 templates"),
    "too many choices": (f"choices: [{'a, ' * (MOST_CHOICES + 1)}]", "expected 2 to 256 templates"),
    "empty choices": ("choices:", "has choices ''; expected 2 to 256 templates, or the name of a column"),
    "a template for a list": ("choices: '{{ends}}'", r"has choices '\{\{ends\}\}'; expected the bare name of a column"),
    "no gold": ("gold: ''", "has an empty gold; expected a column with the number of the right choice"),
    "an expression": ("context: '{{story.upper()}}'", r": context has '\{\{story\.upper\(\)\}\}', which is no column"),
    "a filter": ("choices: ['{{a | trim}}', b]", r": choices has '\{\{a \| trim\}\}', which is no column; expected"),
    "a statement": ("context: '{{story}} {% for x in range(9) %}'", r": context has '\{% for x"),
    "a comment": ("gold: '{{a}} {# x'", r": gold has '\{# x', which is no column"),
    "no rows": ("=context: '{{story}}'\nchoices: ends", "names no rows; expected train: FILE.jsonl, validation: FILE"),
    "a name": ("name: ../x", r"has the name '\.\./x'; expected letters, digits, _, \. and -"),
    "nothing": ("=", "is None; expected an object"),
    "a text": ("=just words", "is 'just words'; expected an object"),
    "no yaml": ("=a: [b\n", r"cannot be read \(line 2: expected ',' or '\]'"),
    "a key twice": ("gold: right\ngold: other", r"cannot be read \(line 5: 'gold' is there twice\)"),
    "two documents": ("=a: b\n---\nc: d\n", r"cannot be read \(line 2: but found another document\)"),
    "a tab": ("=a:\n\t- b", r"cannot be read \(line 2: found character '\\t'"),
    "a bell": ("=a: \x07", r"cannot be read \(special characters are not allowed\)"),
    "code": ("=!!python/object/apply:os.system ['touch executed']", r"is \['touch executed'\]; expected an object"),
    "deep": ("=" + "[" * 30_000, r"cannot be read \(nested too deeply\)"),
    "deep mappings": ("=" + "{a: " * 15_000, r"cannot be read \(nested too deeply\)"),
    "an alias": ("=a: &a [x]\nb: *a", r"cannot be read \(line 2: an alias \(\*\) is not read\)"),
    "a bomb": (
        "=a: &a {x: y}\n" + "".join(f"b{n}: &b{n} {{<<: [*{f'b{n - 1}' if n else 'a'}]}}\n" for n in range(99)),
        "an alias",
    ),
    "large": ("=#" + "x" * 2**16, r"cannot read .*own\.yaml \(more than 65,536 bytes\); expected a task file"),
    "a null": ('validation: "a\\0b"', "is no path that can be used"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = BAD_FILES[case]
    key = text.split(":")[0]
    kept = [line for line in PLAIN.splitlines() if line.split(":")[0] != key]
    text = text[1:] if text.startswith("=") else "\n".join([text, *kept])
    if case == "a key twice":
        text = PLAIN + "gold: other\n"
    path, began = described(tmp_path, text), time.monotonic()
    with pytest.raises(InputError, match=message) as raised:
        load_rows(get_task(path), "validation")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500
    assert time.monotonic() - began < 5
    assert not (tmp_path / "executed").exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"context: \xe9")
    for name, message in (
        ("pipe.yaml", "not a regular file"),
        ("folder.yaml", "Is a directory|not a regular file"),
        ("latin.yaml", "codec can't decode"),
        ("missing.yaml", "No such file"),
        ("a\0b.yaml", "is no path that can be used"),
    ):
        with pytest.raises(InputError, match=message):
            get_task(str(tmp_path / name))


LIST = {"story": "a", "ends": ["b", "c"], "right": 0}
TEXTS = "context: '{{story}}'\nchoices: [sad, '{{mood}}']\ngold: '{{mood}}'\nvalidation: rows.jsonl\n"
BAD_ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no text": (PLAIN, {**LIST, "story": None}, "has story = None; expected a string"),
    "a number": (PLAIN, {**LIST, "story": 3}, "has story = 3; expected a string"),
    "no context": (PLAIN, {"ends": ["b", "c"], "right": 0}, "has no column 'story'; expected story, ends and right"),
    "no list": (PLAIN, {"story": "a", "right": 0}, "has no column 'ends'; expected story, ends and right"),
    "no gold": (PLAIN, {"story": "a", "ends": ["b", "c"]}, "has no column 'right'; expected story, ends and right"),
    "a text for a list": (PLAIN, {**LIST, "ends": "bc"}, "has ends = 'bc'; expected a list of strings"),
    "numbers in a list": (PLAIN, {**LIST, "ends": ["b", 3]}, r"has ends = \['b', 3\]; expected a list of strings"),
    "one choice": (PLAIN, {**LIST, "ends": ["b"]}, "has 1 ends; expected 2 to 256"),
    "many choices": (PLAIN, {**LIST, "ends": ["b"] * 257}, "has 257 ends; expected 2 to 256"),
    "an empty choice": (PLAIN, {**LIST, "ends": ["b", ""]}, "has an empty choice, number 1"),
    "half a character": (PLAIN, {**LIST, "ends": ["b", "\ud800"]}, r": ends holds '\\ud800' at character 0"),
    "gold too large": (PLAIN, {**LIST, "right": 2}, "has right 2; expected an integer from 0 to 1"),
    "gold below": (PLAIN, {**LIST, "right": -1}, "has right -1; expected an integer from 0 to 1"),
    "gold as text": (PLAIN, {**LIST, "right": "0"}, "has right '0'; expected an integer from 0 to 1"),
    "gold true": (PLAIN, {**LIST, "right": True}, "has right True; expected an integer from 0 to 1"),
    "gold a float": (PLAIN, {**LIST, "right": 1.0}, r"has right 1\.0; expected an integer from 0 to 1"),
    "gold a list": (PLAIN, {**LIST, "right": [0]}, r"has right \[0\]; expected an integer from 0 to 1"),
    "gold another text": (
        TEXTS.replace("gold: '{{mood}}'", "gold: '{{right}}'"),
        {"story": "a", "mood": "b", "right": "c"},
        r"has the right answer 'c'; expected one of its choices \('sad', 'b'\)",
    ),
    "a column meant": (
        TEXTS.replace("sad", "story"),
        {"story": "a", "mood": "b"},
        r"has a column 'story', which is also the text of a choice; expected \{\{story\}\} if the column is meant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case: str, tmp_path: Path) -> None:
    text, row, message = BAD_ROWS[case]
    task = get_task(described(tmp_path, text, "\n" + json.dumps(row) + "\n"))
    with pytest.raises(InputError, match=rf"rows\.jsonl:2:? ?{message}") as raised:
        load_rows(task, "validation")
    assert str(raised.value).isprintable()


def test_empty_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl holds no examples; expected at least one: check the file"):
        load_rows(get_task(described(tmp_path, rows="\n\n")), "validation")


def test_the_examples_of_the_docs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/tasks.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    first, second = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "weather-validation.jsonl").write_text(row)
    (tmp_path / "reviews.jsonl").write_text('{"review": "Go!", "verdict": "yes"}')
    asked = []
    for name, content in (("weather", first), ("reviews", second)):
        (tmp_path / f"{name}.yaml").write_text(content)
        task = get_task(str(tmp_path / f"{name}.yaml"))
        asked += [task.question(row) for row in load_rows(task, "validation")]
    assert asked == [
        MultipleChoice("Question: What falls from clouds?\nAnswer:", (" rain", " sand", " gold"), 0),
        MultipleChoice("Go!\nIs it good?", (" no", " yes"), 1),
    ]
