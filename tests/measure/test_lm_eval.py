"""Our model inside the lm-evaluation-harness, and our scores against the harness's own with torch."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from chai_jax.data.batches import encode
from chai_jax.data.tasks import get_task, load_rows
from chai_jax.data.toy import toy_rows, toy_tokenizer
from chai_jax.errors import InputError
from chai_jax.measure.evaluate import evaluate_rows
from chai_jax.model.model import Model
from chai_jax.model.params import OPTConfig, init
from chai_jax.score import loglikelihoods
from chai_jax.serve.generate import generate
from chai_jax.spec import Spec

ROOT = Path(__file__).parents[2]
# The harness and what it brings warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer, spec = toy_tokenizer(), Spec.dense(2, 2, 8)
    config = OPTConfig(len(tokenizer), 16, 2, 2, 32, 64, 16)
    return Model(config, spec, init(config, spec, jax.random.key(0), std=0.4), tokenizer, "random")


@pytest.fixture(scope="module")
def harness() -> Any:
    """`chai_jax.measure.lm_eval`, where the harness is installed."""
    pytest.importorskip("lm_eval")
    return importlib.import_module("chai_jax.measure.lm_eval")


def requests(*arguments: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_the_harness_reports_what_evaluate_reports(harness: Any, model: Model, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = toy_rows("validation", 12)
    solutions = [{"goal": row["sentence"], "sol1": "yes yes", "sol2": "no", "label": row["label"]} for row in rows]
    harness.write_tasks(tmp_path, {"sst2": rows, "piqa": solutions})
    found = simple_evaluate(
        harness.LanguageModel(model, batch_size="auto"),
        tasks=["sst2", "piqa"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=1,
    )["results"]
    for task, given in (("sst2", rows), ("piqa", solutions)):
        ours = evaluate_rows(model, get_task(task), given).metrics()
        measures = ["acc", "acc_norm"] if task == "piqa" else ["acc"]
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


def test_its_command_line_runs_a_saved_model(harness: Any, model: Model, tmp_path: Path, capsys: Any) -> None:
    model.save(tmp_path / "a,model=1")
    (tmp_path / "tasks").mkdir()
    harness.write_tasks(tmp_path / "tasks", {"sst2": toy_rows("validation", 8)})
    before = list(sys.argv)
    chosen = ["--tasks", "sst2", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    harness.run(str(tmp_path / "a,model=1"), chosen)
    assert sys.argv == before
    assert "|sst2 |" in capsys.readouterr().out
    (written,) = (tmp_path / "out").rglob("results*.json")
    acc = json.loads(written.read_text())["results"]["sst2"]["acc,none"]
    assert acc == evaluate_rows(model, get_task("sst2"), toy_rows("validation", 8)).acc


def test_refusals(harness: Any, model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        harness.LanguageModel(model.replace(tokenizer=None))
    with pytest.raises(InputError, match="no counterpart"):
        harness.write_tasks(tmp_path, {"toy": []})


def test_without_the_harness_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "chai_jax.measure.lm_eval", raising=False)
    with pytest.raises(InputError, match=r"pip install 'chai_jax\[eval\]'"):
        importlib.import_module("chai_jax.measure.lm_eval")


def test_agrees_with_the_harness_and_torch(shared: Path, torch: Any, tmp_path: Path) -> None:
    """The experiment, on a few rows and one whose context is longer than the model's 512 positions."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    rows = {name: load_rows(get_task(name), "validation", shared / "data", 6) for name in ("sst2", "rte", "piqa")}
    rows["rte"].append({**rows["rte"][0], "sentence1": "A plain sentence about the weather in Dover. " * 80})
    for name, lines in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    script = [sys.executable, str(ROOT / "experiments/agree_with_lm_eval.py"), str(shared / "models/opt-mini")]
    chosen = ["--data-dir", str(tmp_path), "--batch-size", "4", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*script, *chosen], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out/agreement.json").read_text()) == records
    assert "Truncating" in done.stderr
    assert {name: record["n"] for name, record in records.items()} == {"sst2": 6, "rte": 7, "piqa": 6}
    for record in records.values():
        assert record["agrees"]
        assert record["max_difference_nats"] < 1e-3
        assert record["greedy_differs"] == 0
        for measure in ("acc", "acc_norm"):
            if measure in record:
                assert record[measure]["different_predictions"] == []
                assert record[measure]["harness"] == pytest.approx(record[measure]["chai_jax"], rel=1e-12)
