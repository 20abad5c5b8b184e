"""HellaSwag's rows become what the lm-evaluation-harness makes of them, in the layout of the hub and joined already."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from chai_jax.data.tasks import get_task, load_rows
from chai_jax.errors import InputError

TASK = get_task("hellaswag")
# In the columns of the Hugging Face data set, where the label is a string.
HUB: list[dict[str, Any]] = [
    {
        "ind": 4,
        "activity_label": "Removing ice from car",
        "ctx_a": "Then, the man writes over the snow covering the window of a car, and a woman smiles.",
        "ctx_b": "then",
        "ctx": "Then, the man writes over the snow covering the window of a car, and a woman smiles. then",
        "endings": [
            ", the man adds wax to the windshield and cuts it.",
            ", a person board a ski lift, while two men supporting the head of the person wearing winter clothes snow.",
            ", the man puts on a christmas coat, knitted with netting.",
            ", the man continues removing the snow on his car.",
        ],
        "source_id": "activitynet~v_-1IBHYS3L-Y",
        "label": "3",
    },
    {
        "activity_label": " Home and Garden ",
        "ctx_a": "[header] How to  clean [title] Sweep the  floor. [step] Use a broom [of straw\nor plastic].",
        "ctx_b": "",
        "endings": ["[substeps] Mop it. ", "Rinse [title] Dry.", "[[a] b]", "é  電影   ."],
        "label": "0",
    },
    {
        "activity_label": "Chess",
        "ctx_a": "Two people sit.",
        "ctx_b": "the LEFT one, Ann [title] says",
        "endings": ["a", "b", "c", "d"],
        "label": 1,
    },
]


def read(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    (folder / "hellaswag").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "hellaswag/validation.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return load_rows(TASK, "validation", folder)


def of_the_harness(rows: list[dict[str, Any]]) -> list[tuple[str, list[str], int]]:
    """What the harness's own preprocessing makes of rows in the hub's layout."""
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    datasets = pytest.importorskip("datasets")
    columns = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    found = utils.process_docs(datasets.Dataset.from_list([{name: row[name] for name in columns} for row in rows]))
    return [(row["query"], row["choices"], row["gold"]) for row in found]


def asked(rows: list[dict[str, Any]]) -> list[tuple[str, list[str], int]]:
    questions = [TASK.question(row) for row in rows]
    return [(one.context, [choice.removeprefix(" ") for choice in one.choices], one.label) for one in questions]


def split(row: dict[str, Any]) -> dict[str, Any]:
    """A joined row in the hub's layout, what follows its last full stop as `ctx_b`."""
    activity, _, context = row["ctx"].partition(": ")
    before, stop, after = context.rpartition(". ")
    return {
        **row,
        "activity_label": activity,
        "ctx_a": before + stop.strip(),
        "ctx_b": after,
        "label": str(row["label"]),
    }


def test_as_the_harness_prepares_them(tmp_path: Path) -> None:
    rows = [{**row, "label": str(row["label"])} for row in HUB]
    assert asked(read(HUB, tmp_path)) == of_the_harness(rows)


def test_real_rows(shared: Path, tmp_path: Path) -> None:
    """Joined ones as they are, and split into the hub's columns."""
    rows = [row for row in load_real(shared) if "[" in row["ctx"]][:10]
    rows += load_real(shared)[: 50 - len(rows)]
    assert len(rows) == 50
    ours = read(rows, tmp_path)
    assert asked(ours) == of_the_harness(ours)
    assert [one[0] for one in asked(ours) if "[" not in one[0]] == [one[0] for one in asked(ours)]
    (tmp_path / "split").mkdir()
    parted = [split(row) for row in rows]
    found = asked(read(parted, tmp_path / "split"))
    assert found == of_the_harness(parted)
    assert sum(one[0] != two[0] for one, two in zip(found, asked(ours), strict=True)) > 20  # capital letters


def load_real(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "data/hellaswag/validation.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_an_ending_of_which_nothing_is_left_is_the_harness_s_affair(tmp_path: Path) -> None:
    rows = read([{**HUB[0], "endings": ["[title]", "[a]", "b", "c"]}], tmp_path)
    assert asked(rows) == of_the_harness([{**HUB[0], "endings": ["[title]", "[a]", "b", "c"]}])
    assert TASK.question(rows[0]).choices == (" ", " ", " b", " c")


def test_a_question_as_it_is_written(tmp_path: Path) -> None:
    question = TASK.question(read(HUB[2:], tmp_path)[0])
    assert question.context == "Chess: Two people sit. The left one, ann. says"
    assert question.choices == (" a", " b", " c", " d")
    assert question.label == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no context": ({"endings": ["a", "b"], "label": 0}, r"has no column 'activity_label'; expected activity_label, "),
    "ctx_a alone": ({"ctx_a": "a", "ctx": "b", "endings": ["a", "b"], "label": 0}, "has no column 'activity_label'"),
    "not joined": ({"ctx": "A man", "endings": ["a", "b"], "label": 0}, r"has ctx = 'A man'; expected 'ACTIVITY: CONT"),
    "a number": ({"ctx": 3, "endings": ["a", "b"], "label": 0}, "has ctx = 3; expected a string"),
    "no list": ({"ctx": "A: b", "endings": "ab", "label": 0}, "has endings = 'ab'; expected a list of strings"),
    "hidden label": (
        {"ctx": "A: b", "endings": ["a", "b"], "label": ""},
        "has label ''; expected an integer from 0 to 1",
    ),
    "too large": ({"ctx": "A: b", "endings": ["a", "b"], "label": "4"}, "has label 4; expected an integer from 0 to 1"),
    "a word": ({"ctx": "A: b", "endings": ["a", "b"], "label": "²"}, "has label '²'; expected an integer from 0 to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case: str, tmp_path: Path) -> None:
    row, message = BAD[case]
    with pytest.raises(InputError, match=rf"validation\.jsonl\.gz:2 {message}") as raised:
        read([HUB[0], row], tmp_path)
    assert "\n" not in str(raised.value)
