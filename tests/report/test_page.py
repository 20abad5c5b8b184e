"""The page holds what the runs found, escaped, asks for nothing, and can be read in a real browser."""

import base64
import csv
import json
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from jinja2 import UndefinedError

from chai_jax.cli import main
from chai_jax.report import gallery, page
from chai_jax.report.page import write_page
from chai_jax.report.saved import SavedRun

VOID = {"meta", "img"}
PICTURES = {"pipeline", "tradeoff", "radar", "stages", "pareto", "sensitivity", "losses"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Reader(HTMLParser):
    """Tags with their attributes, the text outside of styles, and whether every element was closed in its turn."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text, self.open = "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, name: str) -> list[dict[str, Any]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="session")
def written(labelled_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The page of a run, and the folder of its pictures."""
    folder = tmp_path_factory.mktemp("report")
    found = write_page([labelled_run], folder / "report.html", folder / "pictures")
    assert found["bytes"] == (folder / "report.html").stat().st_size
    assert found["pictures"] == len(PICTURES)
    return folder / "report.html", folder / "pictures"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and what these tests look at is the text."""
    monkeypatch.setattr(page, "draw", lambda run, folder: [])


def test_what_the_page_says(written: tuple[Path, Path], labelled_run: Path) -> None:
    found = Reader(written[0].read_text(encoding="utf-8"))
    run = SavedRun.read(labelled_run)
    for wanted in (
        "90.0 ± 1.0 %",  # dense
        "80.0 ± 1.0 %",
        "-10.0 pts [-12.00, -8.00]",
        "65.0 %",
        "n = 1,234 validation examples",
        "7.0 % [3.0, 9.0]",  # calibration of the last stage
        "54,318",
        "1.00 [0.50, 6.25]",  # latency of the last stage
        "1 x abacus (wood), float32, seed 3",
        "9.8.7",
        "planning.warmup_tokens",
        "1 bfloat16, 1 int8",
        "2 of 4",
        "Warning:",
        run.command,
    ):
        assert wanted in found.text, wanted


def test_text_stays_text(written: tuple[Path, Path], labelled_run: Path) -> None:
    text = written[0].read_text(encoding="utf-8")
    found = Reader(text)
    assert found.all("script") == []
    assert "<script" not in text
    hostile = json.loads((labelled_run / "results.json").read_text())[0]["task"]
    assert hostile.startswith("<script>")
    assert f"{hostile} on {hostile}" in found.text
    assert text.index("&lt;script&gt;") > 0


def test_every_value_is_escaped_and_can_be_shown() -> None:
    """In text and in attributes; but for a picture's base64, the template takes nothing for HTML."""
    hostile = "</p><script>\"'&\n"
    text = page.PAGES.from_string('<p title="{{ it }}">{{ it }}</p>').render(it=hostile + "\x00\ud800")
    found = Reader(text)
    assert found.tags == [("p", {"title": hostile + "  "})]
    assert found.text == hostile + "  "
    template = Path(page.__file__).with_name("page.html").read_text(encoding="utf-8")
    assert template.count("| safe") == template.count("{{ picture.source | safe }}") == 1
    with pytest.raises(UndefinedError):
        page.PAGES.from_string("{{ misspelt }}").render()


def test_the_page_is_all_there_is(written: tuple[Path, Path]) -> None:
    found = Reader(written[0].read_text(encoding="utf-8"))
    addresses = [given[name] for _, given in found.tags for name in ("src", "href") if name in given]
    assert addresses
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert {name for name, _ in found.tags}.isdisjoint({"link", "script", "iframe", "object"})
    assert any("default-src 'none'" in str(given.get("content")) for given in found.all("meta"))


def test_every_picture_has_words_and_bytes(written: tuple[Path, Path]) -> None:
    images = Reader(written[0].read_text(encoding="utf-8")).all("img")
    assert len(images) == len(PICTURES)
    for image in images:
        kind, content = image["src"].split(";base64,")
        data = base64.b64decode(content, validate=True)
        assert len(image["alt"]) > 20
        if kind == "data:image/png":
            assert data.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(data).tag.endswith("}svg")


def test_numbers_beside_each_picture(written: tuple[Path, Path], labelled_run: Path) -> None:
    rows = {}
    for name in PICTURES:
        assert all((written[1] / f"{name}{suffix}").stat().st_size for suffix in (".png", ".svg"))
        rows[name] = rows_of(written[1] / f"{name}.csv")
    run = SavedRun.read(labelled_run)
    stages = ["dense", "cluster", "distil", "quantize"]
    for name in ("tradeoff", "radar", "stages"):
        assert [row["label"] for row in rows[name]] == stages
        assert [float(row["accuracy"]) for row in rows[name]] == pytest.approx([90, 55, 80, 80])
        assert [float(row["latency"]) for row in rows[name]] == [4, 3, 2, 1]
    assert [float(row["reduction"]) for row in rows["tradeoff"]] == pytest.approx([0, 50, 50, 65])
    assert [row["stage"] for row in rows["pipeline"]] == stages
    assert [float(row["weights"]) for row in rows["stages"]] == pytest.approx(
        [one["model_bytes"] / 1e6 for one in run.records]
    )
    assert [float(row["sensitivity"]) for row in rows["sensitivity"]] == [0.75, 0.125]
    assert [float(row["loss"]) for row in rows["losses"]] == [2.0 / step for step in range(1, 31)]
    # dense is the best, quantize the smallest; the others are beaten by it
    line = [row["label"] for row in rows["pareto"] if row["series"] == "Pareto front"]
    assert line == ["quantize", "dense"]
    ends = [[float(row[f"accuracy_{end}"]) for end in ("low", "high")] for row in rows["pareto"][len(line) :]]
    for (low, high), one in zip(ends, run.records, strict=True):
        assert [low, high] == pytest.approx([100 * end for end in one["metrics"]["acc_interval"]])


@pytest.mark.usefixtures("no_pictures")
def test_a_text_has_perplexities(text_run: Path, tmp_path: Path) -> None:
    write_page([text_run], tmp_path / "page.html")
    found = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "ppl 21.00 ± 0.30" in found.text
    assert "n = 1,234 tokens of a $ b.txt" in found.text


def test_pictures_of_a_text(text_run: Path, tmp_path: Path) -> None:
    """Perplexity, of which less is better, in the place of accuracy; no calibration."""
    run = SavedRun.read(text_run)
    drawings = {one.name: one for one in gallery._of_stages(run)}
    for name in ("radar", "stages", "pareto"):
        drawings[name].at(tmp_path / name)
    rows = {name: rows_of(tmp_path / f"{name}.csv") for name in ("radar", "stages", "pareto")}
    shares = [float(row["perplexity_of_best"]) for row in rows["radar"]]
    assert shares == pytest.approx([1, 21 / 24.5, 21 / 22, 21 / 22], abs=1e-6)
    worse = [float(row["perplexity_worse"]) for row in rows["stages"]]
    assert worse == pytest.approx([0, 1, 1 / 3.5, 1 / 3.5], abs=1e-6)
    assert "ece" not in rows["stages"][0]
    assert [row["label"] for row in rows["pareto"] if row["series"] == "Pareto front"] == ["quantize", "dense"]


@pytest.mark.usefixtures("no_pictures")
def test_several_runs_are_compared(labelled_run: Path, text_run: Path, tmp_path: Path) -> None:
    write_page([labelled_run, labelled_run], tmp_path / "same.html")
    found = Reader((tmp_path / "same.html").read_text(encoding="utf-8"))
    links = {given["href"].removeprefix("#") for given in found.all("a")}
    assert links == {given["id"] for given in found.all("h2") if "id" in given} == {"run-0", "run-1"}
    assert len(found.all("img")) == 1
    assert found.text.count("Latencies can be compared only within a run") == 1
    write_page([labelled_run, text_run], tmp_path / "unlike.html")
    found = Reader((tmp_path / "unlike.html").read_text(encoding="utf-8"))
    assert "Comparison" in found.text
    assert found.all("img") == []


def test_head_maps_are_taken_from_the_run(text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn when the plan is made, since the run does not keep the correlations."""
    for part in ("_of_stages", "_of_layers"):
        monkeypatch.setattr(gallery, part, lambda run: [])
    run = SavedRun.read(Path(shutil.copytree(text_run, tmp_path / "run")))
    assert gallery.draw(run, tmp_path) == []
    (run.path / "report").mkdir()
    for suffix in (".svg", ".png"):
        (run.path / "report" / f"heads{suffix}").touch()
    (found,) = gallery.draw(run, tmp_path)
    assert found.path == run.path / "report" / "heads"


@pytest.mark.usefixtures("no_pictures")
def test_the_command(labelled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(labelled_run), "-o", str(out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == str(out)
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    for argv, said in (
        ([], "no RUN"),
        ([tmp_path / "nothing"], "no run folder"),
        ([labelled_run, "-o", tmp_path], "is a folder"),
    ):
        assert main(["report", *map(str, argv)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert said in line


def test_in_a_real_browser(written: tuple[Path, Path], browser: Any) -> None:
    """No complaint, no request but for the page itself, every picture shown, nothing wider than the window."""
    for width in (1200, 390):
        browser.open(written[0], width)
        images = browser.value("[...document.images].map(image => [image.naturalWidth, image.clientWidth, image.alt])")
        assert len(images) == len(PICTURES)
        assert all(natural > 0 and shown > 0 and alt for natural, shown, alt in images)
        assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.value("document.scripts.length") == 0
    assert browser.value("document.body.innerText.includes('<script>alert(')")
    asked = {address for address in browser.requests if not address.startswith("data:")}
    assert asked == {written[0].resolve().as_uri()}
    assert browser.complaints == []
    assert browser.pdf().startswith(b"%PDF")
