"""Prompts against the lm-evaluation-harness's own rendering; every way rows can be wrong has one clear line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from chai_jax.data.batches import Example
from chai_jax.data.multiple_choice import MultipleChoice, Row
from chai_jax.data.tasks import TASKS, get_task, held_out, load_rows
from chai_jax.errors import InputError

NASTY = [
    "a gorgeous , witty film . ",
    "{{label}} {sentence} {% raw %}",
    'it\'s "fine" <b>&amp;</b> \\n',
    "two\nlines\n",
    "é 電影 \u2028",
    " ",
]
SOURCES = {"sst2": "glue/sst2/default.yaml", "rte": "glue/rte/default.yaml", "piqa": "piqa/piqa.yaml"}


def nasty_rows(name: str) -> list[Row]:
    columns = TASKS[name].columns
    texts = [
        {column: NASTY[(at + shift) % len(NASTY)] for shift, column in enumerate(columns)} for at in range(len(NASTY))
    ]
    return [{**row, "label": at % 2} for at, row in enumerate(texts)]


def write(folder: Path, text: str, split: str = "train") -> Path:
    path = folder / "sst2" / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("real", [False, True], ids=["nasty", "real"])
def test_requests_are_the_harness_s(name: str, real: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    yaml = pytest.importorskip("yaml")
    from lm_eval.api.task import ConfigurableTask

    task = get_task(name)
    rows = nasty_rows(name)
    if real:
        rows = load_rows(task, "validation", request.getfixturevalue("shared") / "data", limit=100)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / SOURCES[name]).read_text())
    local = {"dataset_path": "json", "dataset_name": None, "training_split": None}
    files = {"dataset_kwargs": {"data_files": {"validation": str(file)}}}
    theirs = ConfigurableTask(config={**config, **local, **files})
    theirs.build_all_requests(rank=0, world_size=1)
    asked = [(instance.doc_id, *instance.args) for instance in theirs.instances]
    ours = [task.question(row) for row in rows]
    assert asked == [(at, ours[at].context, choice) for at in range(len(rows)) for choice in ours[at].choices]
    assert [theirs.doc_to_target(row) for row in rows] == [each.label for each in ours]
    assert (task.normalise == "characters") == any(metric["metric"] == "acc_norm" for metric in config["metric_list"])
    assert task.hub == tuple(filter(None, (config["dataset_path"], config["dataset_name"])))


def test_a_request_as_it_is_written() -> None:
    request = get_task("sst2").question({"sentence": "a witty film . ", "label": 1})
    context = "a witty film . \nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert request == MultipleChoice(context, (" negative", " positive"), 1)
    assert request.example == Example(context, " positive")


@pytest.mark.parametrize("name", SOURCES)
def test_rows_come_as_they_are_stored(name: str, tmp_path: Path) -> None:
    rows = nasty_rows(name)
    folder = tmp_path / name
    folder.mkdir()
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    (folder / "validation.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for split in ("train", "validation"):
        assert load_rows(get_task(name), split, tmp_path) == rows
    assert load_rows(get_task(name), "train", str(tmp_path), limit=2) == rows[:2]


@pytest.mark.parametrize(("name", "sizes"), [("sst2", (67_349, 872)), ("rte", (2_490, 277)), ("piqa", (16_113, 1_838))])
def test_the_real_splits_are_whole(name: str, sizes: tuple[int, int], shared: Path) -> None:
    rows = [load_rows(get_task(name), split, shared / "data") for split in ("train", "validation")]
    assert tuple(map(len, rows)) == sizes


GOOD = '{"sentence": "fine", "label": 1}\n'
BAD = {
    "broken": (GOOD + '\n{"sentence": "fi\n', r"train\.jsonl:3 is not JSON \(.+\); expected one object a line"),
    "list": (GOOD + "[1]\n", r"train\.jsonl:2 holds a list; expected a JSON object"),
    "no column": ('{"text": "fine", "label": 1}\n', r":1 has no column 'sentence'; expected sentence and label"),
    "no label": ('{"sentence": "fine"}\n', r":1 has no column 'label'"),
    "number": ('{"sentence": 3, "label": 1}\n', r":1 has sentence = 3; expected a string"),
    "null": ('{"sentence": null, "label": 1}\n', r":1 has sentence = None; expected a string"),
    "too large": (GOOD + GOOD.replace("1", "2"), r":2 has label 2; expected an integer from 0 to 1"),
    "hidden": (GOOD.replace("1", "-1"), r":1 has label -1; expected"),
    "text label": (GOOD.replace("1", '"1"'), r":1 has label '1'; expected"),
    "true label": (GOOD.replace("1", "true"), r":1 has label True; expected"),
    "float label": (GOOD.replace("1", "1.0"), r":1 has label 1\.0; expected"),
    "empty": ("\n \n", r"train\.jsonl holds no examples"),
    "deep": (GOOD + "[" * 100_000 + "\n", r"train\.jsonl:2 is not JSON \(nested too deeply\)"),
    "deep and closed": ('{"a":' * 100_000 + "1" + "}" * 100_000, r":1 is not JSON \(nested too deeply\)"),
    "a huge number": (GOOD.replace("1", "1" * 5000), r":1 is not JSON \(a number of thousands of digits\)"),
    "half a character": (GOOD + GOOD.replace("fine", r"fi\ud800e"), r":2: sentence holds '\\ud800' at character 2"),
    "the other half": (GOOD.replace("fine", r"\udcff"), r":1: sentence holds '\\udcff' at character 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_with_their_line(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    with pytest.raises(InputError, match=message) as raised:
        load_rows(get_task("sst2"), "train", write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_and_whole_pairs_are_read(tmp_path: Path) -> None:
    rows = load_rows(get_task("sst2"), "train", write(tmp_path, "\ufeff" + GOOD.replace("fine", r"\ud83d\ude00")))
    assert rows == [{"sentence": "😀", "label": 1}]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    task = get_task("sst2")
    with pytest.raises(InputError, match=r"sst2/train\.jsonl\[\.gz\] is missing.*--data-dir"):
        load_rows(task, "train", tmp_path)
    with pytest.raises(InputError, match=r"split 'test' is unknown; expected one of train, validation"):
        load_rows(task, "test", tmp_path)
    with pytest.raises(InputError, match=r"limit is 0; expected at least 1"):
        load_rows(task, "train", write(tmp_path, GOOD), limit=0)
    with pytest.raises(InputError, match=r"task 'cola' is unknown; expected one of sst2, rte, piqa"):
        get_task("cola")


def test_without_network_the_folder_is_recommended() -> None:
    """The tests run with HF_HUB_OFFLINE."""
    message = r"cannot fetch nyu-mll/glue/sst2.*sst2/train\.jsonl with --data-dir"
    with pytest.raises(InputError, match=message) as raised:
        load_rows(get_task("sst2"), "train")
    assert "\n" not in str(raised.value)


def test_rows_from_the_hub_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*path: str, split: str) -> Any:
        asked.append((path, split))
        return datasets.Dataset.from_list([{"sentence": "fine", "label": 0}, {"sentence": "fine", "label": -1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"nyu-mll/glue/sst2 train, row 2 has label -1"):
        load_rows(get_task("sst2"), "train")
    assert load_rows(get_task("sst2"), "train", limit=1) == [{"sentence": "fine", "label": 0}]
    assert asked == [(("nyu-mll/glue", "sst2"), "train")] * 2


def test_held_out_rows_are_disjoint_and_reproducible() -> None:
    rows = [{"sentence": f"sentence {at}", "label": at % 2} for at in range(100)]
    held, rest = held_out(rows, 30, seed=1)
    assert len(held) == 30
    assert sorted(row["sentence"] for row in held + rest) == sorted(row["sentence"] for row in rows)
    assert rest == [row for row in rows if row not in held]
    assert held_out(rows, 30, seed=1) == (held, rest)
    assert held_out(rows, 30, seed=2)[0] != held
    assert len(held_out(rows, 1000)[0]) == 50


def test_a_text_that_is_held_out_is_not_trained_on_under_another_number() -> None:
    rows = [{"sentence": f"sentence {at % 40}", "label": at % 2, "idx": at} for at in range(100)]
    held, rest = held_out(rows, 20)
    assert not {row["sentence"] for row in held} & {row["sentence"] for row in rest}
    assert {row["sentence"] for row in held + rest} == {row["sentence"] for row in rows}
