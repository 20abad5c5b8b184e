"""Our models inside the lm-evaluation-harness (EleutherAI, 0.4.10 and later), as its model "chai-jax".

This module needs the extra `chai_jax[eval]`; importing it without raises InputError.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import jax

from chai_jax.data.batches import Encoded
from chai_jax.data.chat import check_template
from chai_jax.data.tokens import bare_tokens, prefix_token, require_tokenizer, tokenize
from chai_jax.errors import InputError
from chai_jax.evaluation.harness_requests import generation_settings, sequences, without_refused_system
from chai_jax.evaluation.harness_results import results_folder, written_files
from chai_jax.evaluation.harness_tasks import HARNESS_FILES, local_rows, write_tasks
from chai_jax.evaluation.tasks import BATCH_SIZE
from chai_jax.files.atomic import check_writable
from chai_jax.inputs.reading import Record
from chai_jax.machine.processes import first_process
from chai_jax.model.execution import Execution
from chai_jax.model.model import Model
from chai_jax.score.loglikelihood import loglikelihoods
from chai_jax.serve.generate import encode_prompt, generate_tokens
from chai_jax.sources import open_model

try:
    import lm_eval
    import lm_eval.models  # before ours: the harness fills its registry only where it finds it empty
    from datasets.exceptions import DatasetNotFoundError
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import (
        get_rolling_token_windows,
        handle_non_serializable,
        make_disjoint_window,
        setup_logging,
    )
except ModuleNotFoundError as error:
    raise InputError(
        f"the lm-evaluation-harness is not there (no module {error.name}): pip install 'chai_jax[eval]'"
    ) from None

Pair = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("chai-jax")
class LanguageModel(TemplateLM):  # type: ignore[misc]
    """A `Model` as the harness wants it; tokens, truncation and windows are those of its Hugging Face model."""

    def __init__(
        self,
        pretrained: str | Model,
        batch_size: int | str = BATCH_SIZE,
        max_batch_size: int | None = None,
        device: str | None = None,
        revision: str | None = None,
        execution: Execution | None = None,
        **unknown: Any,
    ):
        """
        Args:
            pretrained: a model, or the folder or hub id to load, or `toy`.
            batch_size: sequences per device and batch; "auto" is 32.
            max_batch_size: upper bound of `batch_size`.
            device: not used; JAX decides (see JAX_PLATFORMS).
            revision: of a hub model.
            execution: how a model that is loaded is run; as suits the devices here, if not given.

        Raises:
            InputError: another argument, a batch size that is no number, a model that cannot be loaded or has no
                tokenizer.
        """
        super().__init__()
        if unknown:
            raise InputError(f"model_args has {', '.join(unknown)}; expected nothing but pretrained and revision")
        self.model = (
            pretrained if isinstance(pretrained, Model) else open_model(pretrained, revision, execution=execution)
        )
        size = sequences(batch_size)
        self.batch_size = min(size, max_batch_size or size)
        self.tokenizer = require_tokenizer(self.model.tokenizer, self.model.source)

    @property
    def eot_token_id(self) -> int:
        end: int | None = self.tokenizer.eos_token_id
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.tokenizer)

    @property
    def max_length(self) -> int:
        return self.model.config.max_positions

    @property
    def tokenizer_name(self) -> str:
        return self.model.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, begun as the tokenizer begins them (see `tokenize`) unless `add_special_tokens` says how."""
        if add_special_tokens is None:
            return tokenize(self.tokenizer, string)
        return bare_tokens(self.tokenizer, string, special=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, of several the one of this name; InputError where it has none."""
        if chat_template:
            check_template(self.tokenizer, self.model.source or "the model", "--apply_chat_template")
        try:
            found: str | None = super().chat_template(chat_template)
        except ValueError as error:
            raise InputError(f"--apply_chat_template: {' '.join(str(error).split())}") from None
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one prompt (see `chai_jax.data.chat.conversation`)."""
        return without_refused_system(self.tokenizer, chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Summed log-probability, is greedy) per (context, continuation), one task after the other.

        The order of float32 sums depends on the batch, and a compressed cache rounds what comes of them. So no batch
        holds questions of two tasks: a task's answers are those of `evaluate` bit for bit, whatever runs beside it.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for task in dict.fromkeys(request.task_name for request in requests):
            members = [index for index, request in enumerate(requests) if request.task_name == task]
            found = super().loglikelihood([requests[index] for index in members], disable_tqdm)
            for index, answer in zip(members, found, strict=True):
                answers[index] = answer
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """(Summed log-probability, is greedy) per (name, context, continuation), too long contexts cut on the left."""
        encoded = []
        for _name, context, continuation in requests:
            tokens = (*(context or [self.prefix_token_id]), *continuation)[-(self.max_length + 1) :]
            encoded.append(Encoded(tokens, len(tokens) - len(continuation)))
        scores = loglikelihoods(self.model, encoded, self.batch_size)
        answers = [(float(total), bool(greedy)) for total, greedy in scores]
        for (name, _context, _continuation), answer in zip(requests, answers, strict=True):
            if name is not None:
                self.cache_hook.add_partial("loglikelihood", name, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each in windows of the model's length."""
        texts = [request.args[0] for request in requests]
        windows: list[Pair] = []
        counts = []
        for text in texts:
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum((next(scores)[0] for _ in range(count)), start=0.0) for count in counts]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string; requests with the same settings are generated together."""
        settings = [generation_settings(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        for wanted in dict.fromkeys(settings):
            members = [index for index, setting in enumerate(settings) if setting == wanted]
            until, length, temperature, top_k, top_p = wanted
            room = self.max_length - length
            if room < 1:
                raise InputError(
                    f"{length} new tokens do not fit the model's {self.max_length} positions: lower max_gen_toks"
                )
            prompts = [encode_prompt(self.model, requests[index].args[0])[-room:] for index in members]
            made = generate_tokens(self.model, prompts, length, temperature, top_k, top_p, batch_size=self.batch_size)
            for index, tokens in zip(members, made, strict=True):
                # The harness stops at the tokenizer's end of text too, whatever the model's own stops are.
                ends = tokens.index(self.eot_token_id) if self.eot_token_id in tokens else None
                text = self.tokenizer.decode(tokens[:ends], skip_special_tokens=True)
                for stop in until:
                    text = text.split(stop)[0]
                texts[index] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def run_harness(
    model: str,
    arguments: Sequence[str],
    data_dir: Path | None = None,
    revision: str | None = None,
    execution: Execution | None = None,
) -> Record:
    """`lm-eval run` on one of our models; the harness prints its tables and writes its results files.

    Args:
        model: folder, hub id, or `toy`.
        arguments: the harness's own (`--tasks`, `--include_path`, `--output_path`, ...).
        data_dir: read those of `HARNESS_FILES` that are among the tasks from this folder, not from the hub.
        revision: of a hub model.
        execution: how the model is run; as suits the devices here, if not given.

    Returns:
        The harness's "results" and "n-samples" by task, its "versions" of the tasks, its seeds ("config"), and the
        "files" it wrote.

    Raises:
        InputError: what the harness refuses before it begins, data that cannot be fetched, results that cannot be
            written.
        SystemExit: options that the harness's parser refuses, status 2.
    """
    setup_logging()
    harness, given = HarnessCLI(), json.dumps({"pretrained": model, **({"revision": revision} if revision else {})})
    chosen = ["--model", "chai-jax", "--model_args", given, "--batch_size", "auto", "--device", jax.default_backend()]
    # The harness has no other way in than the process's arguments.
    with _replaced(sys, "argv", ["lm-eval", "run", *chosen, *arguments]):
        namespace = harness.parse_args()
    if namespace.model != "chai-jax":
        raise InputError(f"--model is {namespace.model}; expected MODEL alone: run other models with lm-eval itself")
    with tempfile.TemporaryDirectory(prefix="chai_jax_") as folder:
        if data_dir is not None:
            _use_local_rows(namespace, data_dir, Path(folder))
        # Nor for an object beside the arguments of a model.
        with _replaced(LanguageModel, "__init__", partialmethod(LanguageModel.__init__, execution=execution)):
            return _execute(harness, namespace)


def _use_local_rows(namespace: argparse.Namespace, data_dir: Path, folder: Path) -> None:
    """Let the harness's parsed options find, before all others, tasks that read `data_dir`; they go into `folder`."""
    names = [name for name in HARNESS_FILES if name in (namespace.tasks or ())]
    if not names:
        raise InputError(f"--data-dir holds rows for {', '.join(HARNESS_FILES)}; expected one of them among --tasks")
    write_tasks(folder, {name: local_rows(name, data_dir, few_shot=bool(namespace.num_fewshot)) for name in names})
    namespace.include_path = [path for path in (namespace.include_path, str(folder)) if path]


def _execute(harness: Any, namespace: argparse.Namespace) -> Record:
    """Let the harness do what its parsed options say; see `run_harness`."""
    passed: Record = {}
    evaluate = lm_eval.simple_evaluate

    def watched(*args: Any, evaluation_tracker: Any, **options: Any) -> Record | None:
        """`simple_evaluate`: what goes in and comes out, since the harness's command line returns nothing."""
        passed["tracker"] = evaluation_tracker
        if evaluation_tracker.output_path:  # the harness would find it out at the end, and only warn
            check_writable(results_folder(evaluation_tracker.output_path))
        found: Record = evaluate(*args, evaluation_tracker=evaluation_tracker, **options)
        passed["results"] = found
        return found if first_process() else None  # what the others return they would write

    try:
        with _replaced(lm_eval, "simple_evaluate", watched):
            harness.execute(namespace)
    except BrokenPipeError:  # a ConnectionError too, but of whoever reads the tables
        raise
    except (ConnectionError, DatasetNotFoundError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"cannot fetch a task's data ({reason}); give local rows with --data-dir (for {', '.join(HARNESS_FILES)}) "
            "or tasks that read local files with --include_path"
        ) from None
    except (ValueError, TypeError, OSError) as error:
        if passed or isinstance(error, InputError):
            raise
        raise InputError(f"lm-eval: {' '.join(str(error).split())}") from None
    found = {name: passed["results"].get(name) for name in ("results", "groups", "n-samples", "versions", "config")}
    found["files"] = written_files(passed["tracker"]) if first_process() else []
    readable: Record = json.loads(json.dumps(found, default=handle_non_serializable))
    return readable


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
