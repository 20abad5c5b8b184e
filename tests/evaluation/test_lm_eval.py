"""Our model inside the lm-evaluation-harness, and our scores against the harness's own with torch."""

import argparse
import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.cli import main
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.data.batches import encode
from chai_jax.data.tasks import get_task, load_rows
from chai_jax.data.text import pages, read_text_file
from chai_jax.data.toy import toy_rows, toy_tokenizer
from chai_jax.errors import InputError
from chai_jax.evaluation.harness_tasks import local_rows, write_tasks
from chai_jax.evaluation.tasks import evaluate_rows
from chai_jax.files.export import export
from chai_jax.files.store import load, save
from chai_jax.model.model import Model
from chai_jax.model.params import init
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan
from chai_jax.plans.spec import Spec
from chai_jax.score.loglikelihood import loglikelihoods
from chai_jax.serve.generate import generate

ROOT = Path(__file__).parents[2]
# The harness and what it brings warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """The harness logs to the stderr of its first call, which pytest closes with that test."""
    yield
    logging.getLogger("lm_eval").handlers.clear()


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer, spec = toy_tokenizer(), Spec.dense(2, 2, 8)
    config = Architecture(len(tokenizer), 16, 2, 2, 32, 64, 16)
    return Model(config, spec, init(config, spec, jax.random.key(0), std=0.4), tokenizer, "random")


@pytest.fixture(scope="module")
def harness() -> Any:
    """`chai_jax.evaluation.lm_eval`, where the harness is installed."""
    pytest.importorskip("lm_eval")
    return importlib.import_module("chai_jax.evaluation.lm_eval")


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line knows the tasks of its include path alone: to read all of the harness's takes eight seconds."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


def requests(*arguments: tuple[Any, ...], task: str = "any") -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each, task_name=task) for each in arguments]


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]], split: str = "validation") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_harness_reports_what_evaluate_reports(harness: Any, model: Model, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = toy_rows("validation", 12)
    solutions = [{"goal": row["sentence"], "sol1": "yes yes", "sol2": "no", "label": row["label"]} for row in rows]
    contexts = [
        {"ctx": f"Film: {row['sentence']}", "endings": ["yes yes", "no", "is [not] it", "a"], "label": 2 * row["label"]}
        for row in rows
    ]
    write_rows(tmp_path / "data", "hellaswag", contexts)
    given = {"sst2": rows, "piqa": solutions, "hellaswag": local_rows("hellaswag", tmp_path / "data")["validation"]}
    write_tasks(tmp_path, {name: {"validation": one} for name, one in given.items()})
    found = simple_evaluate(
        harness.LanguageModel(model, batch_size="auto"),
        tasks=[*given],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=1,
    )["results"]
    for task, asked in given.items():
        ours = evaluate_rows(model, get_task(task), asked).metrics()
        measures = ["acc"] if task == "sst2" else ["acc", "acc_norm"]
        for name in (*measures, *(f"{measure}_stderr" for measure in measures)):
            assert found[task][f"{name},none"] == pytest.approx(ours[name], rel=1e-12)


def test_loglikelihood_cuts_long_contexts_as_encode_does(harness: Any, model: Model) -> None:
    pairs = [("the plot is dull . " * 20, "yes"), ("the plot is dull .", " no"), ("", "the plot")]
    found = harness.LanguageModel(model).loglikelihood(requests(*pairs), disable_tqdm=True)
    encoded = [encode(model.tokenizer, *pair, model.config.max_positions) for pair in pairs]
    assert len(encoded[0].tokens) == 65
    np.testing.assert_allclose([total for total, _ in found], loglikelihoods(model, encoded)[:, 0], rtol=1e-6)
    assert all(type(total) is float and type(greedy) is bool for total, greedy in found)


def test_rolling_windows_predict_every_token_once(harness: Any, model: Model) -> None:
    short, long = "the plot is dull .", "the plot is never very dull . " * 20
    wrapped = harness.LanguageModel(model)
    tokens = wrapped.tok_encode(long)
    assert len(tokens) == 141
    # As the docstring of LM.loglikelihood_rolling shows: full windows, and the last one reaches back for context.
    inputs = [[2, *tokens[:63]], tokens[63:127], tokens[76:140]]
    targets = [tokens[:64], tokens[64:128], tokens[128:]]
    expected = 0.0
    for fed, predicted in zip(inputs, targets, strict=True):
        logprobs = jax.nn.log_softmax(model(np.array([fed])))[0, -len(predicted) :]
        expected += float(logprobs[np.arange(len(predicted)), np.array(predicted)].sum())
    found = wrapped.loglikelihood_rolling(requests((long,), (short,)))
    assert found[0] == pytest.approx(expected, rel=1e-5)
    alone = encode(model.tokenizer, "", short)
    doubled = loglikelihoods(model, [type(alone)((2, *alone.tokens), 1)])
    assert found[1] == pytest.approx(doubled[0, 0], rel=1e-5)


def test_generation_stops_where_it_is_told(harness: Any, model: Model) -> None:
    prompts = ["the plot is", "critics say the cast"]
    free = generate(model, prompts, max_new_tokens=6)
    stop = free[0].split()[2]
    settings = [{"until": [stop], "max_gen_toks": 6}, {"until": [], "max_gen_toks": 6}, {"max_gen_toks": 6}]
    asked = [(prompts[0], settings[0]), (prompts[1], settings[1]), ("the plot is " * 30 + prompts[0], settings[2])]
    found = harness.LanguageModel(model).generate_until(requests(*asked))
    assert found[0] == free[0].split(stop)[0]
    assert found[1] == free[1]
    assert len(found[2].split()) == 6
    with pytest.raises(InputError, match="64 new tokens do not fit"):
        harness.LanguageModel(model).generate_until(requests((prompts[0], {"max_gen_toks": 64})))


def test_results_go_to_the_harness_cache(harness: Any, model: Model) -> None:
    wrapped, seen = harness.LanguageModel(model), []
    wrapped.cache_hook = SimpleNamespace(add_partial=lambda *entry: seen.append(entry))
    (answer,) = wrapped.loglikelihood(requests(("the plot", " is")), disable_tqdm=True)
    (total,) = wrapped.loglikelihood_rolling(requests(("the plot",)))
    assert seen == [("loglikelihood", ("the plot", " is"), answer), ("loglikelihood_rolling", ("the plot",), total)]


@pytest.fixture(scope="module")
def small(model: Model) -> Model:
    """`model` clustered in pairs, its keys, values and weights in int8."""
    layer = LayerPlan((ClusterPlan((0, 1), 0, storage="int8"),), "low", "int8")
    chosen = Plan((layer, layer), share="qkv")
    return quantize(cluster(model, chosen), chosen)


def test_a_tasks_answers_do_not_depend_on_the_tasks_beside_it(harness: Any, small: Model) -> None:
    """Bit for bit, though an int8 cache rounds differently in another batch."""
    short = [(row["sentence"], " yes") for row in toy_rows("validation", 9)]
    long = [(" ".join([row["sentence"]] * 3), " no") for row in toy_rows("validation", 5)]
    wrapped = harness.LanguageModel(small, batch_size=4)
    mixed = [*requests(*short[:4], task="short"), *requests(*long, task="long"), *requests(*short[4:], task="short")]
    found = wrapped.loglikelihood(mixed, disable_tqdm=True)
    assert found[4:9] == wrapped.loglikelihood(requests(*long), disable_tqdm=True)
    expected = loglikelihoods(small, [encode(small.tokenizer, *pair, 64) for pair in short], 4)
    assert [list(answer) for answer in found[:4] + found[9:]] == expected.tolist()


def test_rolling_and_generation_are_the_harness_s_with_torch(
    harness: Any, model: Model, torch: Any, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    export(model, tmp_path / "hf")
    theirs = HFLM(str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=2)
    ours = harness.LanguageModel(model)
    assert (theirs.max_length, theirs.prefix_token_id) == (ours.max_length, ours.prefix_token_id)
    texts = ["the plot is dull .", "the plot is never very dull . " * 20, "a great cast " * 21, ""]
    rolled = theirs.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests(*((text,) for text in texts))), rolled, rtol=1e-5)
    free = generate(model, ["the plot is"], max_new_tokens=8)[0]
    settings = [{"until": [], "max_gen_toks": 8}, {"until": free.split()[3], "max_gen_toks": 8}]
    asked = [
        (text, setting) for text in ("the plot is", "critics say the cast", "a dull " * 40) for setting in settings
    ]
    made = theirs.generate_until(requests(*asked), disable_tqdm=True)
    assert ours.generate_until(requests(*asked)) == made
    assert len(set(made)) > 2


def run_command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[dict[str, Any], str]:
    """What `chai-jax lm-eval` prints: its last line, read, and what stands before."""
    assert main(["lm-eval", *map(str, argv)]) == 0
    *before, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows for sst2 and rte, and of a text of three documents."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, "sst2", toy_rows("validation", 12))
    (folder / "wikitext2").mkdir()
    text = "".join(f" \n = {word} = \n \n the plot is {word} , said critics . \n" for word in ("dull", "great", "bad"))
    (folder / "wikitext2/test.raw.txt").write_text(text)
    return folder


@pytest.mark.usefixtures("few_tasks")
def test_the_command_hands_the_harness_its_options(
    harness: Any, small: Model, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(small, tmp_path / "a,model=1")
    before = list(sys.argv)
    options = ["--tasks", "sst2", "wikitext", "--limit", 8, "--output_path", tmp_path / "out", "--log_samples"]
    found, printed = run_command(capsys, tmp_path / "a,model=1", *options, "--batch_size=4", "--data-dir", data)
    assert sys.argv == before
    assert "|sst2 " in printed
    assert "word_perplexity" in printed
    result = evaluate_rows(small, get_task("sst2"), toy_rows("validation", 12)[:8], batch_size=4)
    metrics = result.metrics()
    assert found["results"]["sst2"]["acc,none"] == metrics["acc"]
    assert found["results"]["sst2"]["acc_stderr,none"] == pytest.approx(metrics["acc_stderr"], rel=1e-12)
    assert found["n-samples"] == {
        "sst2": {"original": 12, "effective": 8},
        "wikitext": {"original": 3, "effective": 3},
    }
    assert (found["config"]["batch_size"], found["config"]["device"]) == ("4", "cpu")
    assert (found["compute_dtype"], found["versions"]["sst2"]) == ("float32", 1.0)
    written = {Path(file).name.split("_2")[0]: Path(file) for file in found["files"]}
    assert written.keys() == {"results", "samples_sst2", "samples_wikitext"}
    saved = json.loads(written["results"].read_text())
    assert saved["results"]["sst2"]["acc,none"] == metrics["acc"]
    assert saved["config"]["model_args"] == {"pretrained": str(tmp_path / "a,model=1")}
    lines = [json.loads(line) for line in written["samples_sst2"].read_text().splitlines()]
    logged = [[float(answer[0]) for answer in line["filtered_resps"]] for line in lines]
    np.testing.assert_array_equal(logged, result.loglikelihoods)
    # Word perplexity by its definition, over three documents; words are what blanks separate, at the ends too.
    documents = [json.loads(line) for line in written["samples_wikitext"].read_text().splitlines()]
    total = sum(float(document["filtered_resps"][0]) for document in documents)
    words = sum(len(re.split(r"\s+", page)) for page in pages(read_text_file(data / "wikitext2/test.raw.txt")))
    assert found["results"]["wikitext"]["word_perplexity,none"] == pytest.approx(np.exp(-total / words), rel=1e-9)


@pytest.mark.usefixtures("few_tasks")
def test_examples_in_the_prompt_come_from_the_local_training_rows(
    harness: Any, small_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, "sst2", toy_rows("validation", 4))
    job = [small_model, "--tasks", "sst2", "--num_fewshot", 2, "--data-dir", tmp_path]
    assert main(["lm-eval", *map(str, job)]) == 2
    assert "train.jsonl[.gz] is missing" in capsys.readouterr().err
    write_rows(tmp_path, "sst2", [{"sentence": "very witty ", "label": 1}] * 5, "train")
    found, _ = run_command(capsys, *job, "--output_path", tmp_path / "out", "--log_samples")
    (samples,) = (file for file in found["files"] if "samples" in file)
    prompt = json.loads(Path(samples).read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("very witty \nQuestion: Is this sentence positive or negative?\nAnswer: positive") == 2


@pytest.mark.slow
def test_local_rows_take_the_place_of_the_harness_s_own(
    harness: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all tasks of the harness known, beside a task of a person's own, on the toy."""
    (tmp_path / "own.yaml").write_text(json.dumps({"include": str(tmp_path / "base.yaml"), "task": "own"}))
    write_tasks(tmp_path, {"piqa": {"validation": [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}] * 3}})
    (tmp_path / "piqa.yaml").rename(tmp_path / "base.yaml")
    found, _ = run_command(
        capsys, "toy", "--tasks", "sst2,own", "--data-dir", data, "--include_path", tmp_path, "--limit", 3
    )
    assert {name: counts["effective"] for name, counts in found["n-samples"].items()} == {"sst2": 3, "own": 3}


REFUSED = {
    "no such task": (["--tasks", "sst2,parity"], "Tasks not found: parity"),
    "no tasks": ([], "expected one of them among --tasks"),
    "another model": (["--tasks", "sst2", "--model", "hf"], "--model is hf"),
    "an argument of another model": (["--tasks", "sst2", "--model_args", "load_in_8bit=True"], "has load_in_8bit"),
    "a batch size": (["--tasks", "sst2", "--batch_size", "many"], "--batch_size is 'many'"),
    "samples that go nowhere": (["--tasks", "sst2", "--log_samples"], "Specify --output_path"),
    "a missing file": (["--tasks", "rte"], "rte/validation.jsonl[.gz] is missing"),
    "no local rows": (["--tasks", "arc_easy"], "--data-dir holds rows for sst2, rte, piqa, hellaswag, wikitext"),
    "an output path that is a file": (["--tasks", "sst2", "--output_path", __file__], "cannot write to"),
}


@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_gives_one_line(
    kind: str, harness: Any, small_model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = REFUSED[kind]
    assert main(["lm-eval", str(small_model), "--data-dir", str(data), *options]) == 2
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert message in line
    assert (captured.out, "Traceback" in captured.err) == ("", False)


def test_what_the_harness_s_parser_refuses(harness: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--tasks", "sst2", "--shots", "5"], ["--limit", "few"]):
        with pytest.raises(SystemExit) as stopped:
            main(["lm-eval", "toy", *argv])
        assert stopped.value.code == 2
        assert "lm-eval" in capsys.readouterr().err


@pytest.mark.usefixtures("few_tasks")
def test_data_that_cannot_be_fetched(
    harness: Any, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tests run offline."""
    source = Path(importlib.import_module("lm_eval.tasks").__file__ or "").parent / "glue/sst2/default.yaml"
    (tmp_path / "own.yaml").write_text(json.dumps({"include": str(source), "task": "own"}))
    assert main(["lm-eval", str(small_model), "--tasks", "own", "--include_path", str(tmp_path)]) == 2
    assert "give local rows with --data-dir" in capsys.readouterr().err


def test_tables_that_nobody_reads_are_no_data_that_cannot_be_fetched(harness: Any) -> None:
    """A broken pipe is a ConnectionError, too."""

    def broken(namespace: Any) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        harness._execute(SimpleNamespace(execute=broken), argparse.Namespace())


@pytest.mark.usefixtures("few_tasks")
def test_results_that_cannot_be_written(
    harness: Any, small_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The harness itself would say so in a warning and end with status 0."""
    (tmp_path / str(small_model).replace("/", "__")).write_text("in the way of the folder")
    job = ["lm-eval", small_model, "--tasks", "sst2", "--data-dir", data, "--output_path", tmp_path]
    assert main([str(argument) for argument in job]) == 2
    assert "the results could not be written" in capsys.readouterr().err


def test_help_says_whose_the_options_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["lm-eval", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "those below are the harness's own: --tasks, --num_fewshot" in text
    assert "`lm-eval run --help`" in text


def test_refusals(harness: Any, model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        harness.LanguageModel(model.replace(tokenizer=None))
    with pytest.raises(InputError, match="no counterpart"):
        write_tasks(tmp_path, {"toy": {}})


def test_without_the_harness_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "chai_jax.evaluation.lm_eval", raising=False)
    with pytest.raises(InputError, match=r"pip install 'chai_jax\[eval\]'"):
        importlib.import_module("chai_jax.evaluation.lm_eval")
    assert main(["lm-eval", "toy", "--tasks", "sst2"]) == 2
    assert capsys.readouterr().err.count("pip install 'chai_jax[eval]'") == 1


@pytest.mark.slow
def test_agrees_with_the_harness_and_torch(shared: Path, torch: Any, tmp_path: Path) -> None:
    """The experiment, on a few rows and one whose context is longer than the model's 512 positions."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    names = ("sst2", "rte", "piqa", "hellaswag")
    rows = {name: load_rows(get_task(name), "validation", shared / "data", 6) for name in names}
    rows["rte"].append({**rows["rte"][0], "sentence1": "A plain sentence about the weather in Dover. " * 80})
    for name, lines in rows.items():
        write_rows(tmp_path, name, lines)
    write_rows(tmp_path, "sst2", load_rows(get_task("sst2"), "train", shared / "data", 16), "train")
    (tmp_path / "wikitext2").symlink_to(shared / "data/wikitext2")
    script = [sys.executable, str(ROOT / "experiments/agree_with_lm_eval.py"), str(shared / "models/opt-mini")]
    chosen = ["--data-dir", str(tmp_path), "--batch-size", "4", "--pages", "1", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*script, *chosen], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out/agreement.json").read_text()).items() >= records.items()
    assert "Truncating" in done.stderr
    wikitext = records["dense"].pop("wikitext")
    assert (wikitext["n"], wikitext["agrees"]) == (1, True)
    assert wikitext["word_perplexity"]["chai_jax"] == pytest.approx(wikitext["word_perplexity"]["harness"], rel=1e-5)
    both = [(kind, name, record) for kind, tasks in records.items() for name, record in tasks.items()]
    sizes = {"sst2": 6, "rte": 7, "piqa": 6, "hellaswag": 6}
    assert [(kind, name) for kind, name, _ in both] == list(product(("dense", "compressed"), sizes))
    for kind, name, record in both:
        assert record["n"] == sizes[name]
        assert record["agrees"]
        assert record["max_difference_nats"] <= {"dense": 1e-3, "compressed": 0.0}[kind]
        assert record["greedy_differs"] == 0
        for measure in ("acc", "acc_norm"):
            if measure in record:
                assert record[measure]["different_predictions"] == []
                assert record[measure]["harness"] == pytest.approx(record[measure]["chai_jax"], rel=1e-12)


@pytest.mark.slow
def test_agrees_with_torch(shared: Path, torch: Any, tmp_path: Path) -> None:
    """The experiment; of a model with other weights it says that they disagree."""
    model, other = shared / "models/opt-mini", tmp_path / "other"
    script = [sys.executable, str(ROOT / "experiments/agree_with_torch.py"), str(model)]
    text = ["--text", str(shared / "data/wikitext2/test.raw.txt.gz"), "--windows", "3", "--window", "64"]
    chosen = [*text, "--prompts", "2", "--tokens", "20", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*script, *chosen], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out/agreement.json").read_text()).items() >= record.items()
    assert record["windows"]["n"] == 3 * 63
    assert record["texts"]["equal"] == 2
    changed = load(model)
    changed.params["final_norm"]["scale"] = changed.params["final_norm"]["scale"] * 1.1
    export(changed, other)
    done = subprocess.run([*script, "--theirs", str(other), *chosen], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    record = json.loads(done.stdout.splitlines()[-1])
    assert not record["windows"]["agrees"]
