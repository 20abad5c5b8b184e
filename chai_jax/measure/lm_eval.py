"""Our models inside the lm-evaluation-harness (EleutherAI, 0.4.10 and later), as its model "chai-jax".

This module needs the extra `chai_jax[eval]`; importing it without raises InputError.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chai_jax.data.batches import Encoded
from chai_jax.data.tasks import Row
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.score import loglikelihoods
from chai_jax.serve.generate import generate_tokens

try:
    import lm_eval
    import lm_eval.models  # before ours: the harness fills its registry only where it finds it empty
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise InputError(
        f"the lm-evaluation-harness is not there (no module {error.name}): pip install 'chai_jax[eval]'"
    ) from None

BATCH_SIZE = 32
Pair = tuple[tuple[str, str] | None, list[int], list[int]]
SOURCES = {"sst2": "glue/sst2/default.yaml", "rte": "glue/rte/default.yaml", "piqa": "piqa/piqa.yaml"}


@register_model("chai-jax")
class LanguageModel(TemplateLM):  # type: ignore[misc]
    """A `Model` as the harness wants it; tokens, truncation and windows are those of its Hugging Face model."""

    def __init__(
        self,
        pretrained: str | Model,
        batch_size: int | str = BATCH_SIZE,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """
        Args:
            pretrained: a model, or the folder or hub id to load.
            batch_size: sequences per device and batch; "auto" is 32.
            max_batch_size: upper bound of `batch_size`.
            device: not used; JAX decides (see JAX_PLATFORMS).
        """
        super().__init__()
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained)
        if self.model.tokenizer is None:
            raise InputError(f"{self.model.source or 'the model'} has no tokenizer; expected its tokenizer files")
        size = BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self.batch_size = min(size, max_batch_size or size)
        self.tokenizer = self.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.model.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.config.bos_token_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_positions

    @property
    def tokenizer_name(self) -> str:
        return self.model.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; `</s>` first, unless the text already begins with it or `add_special_tokens` is False."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """(Summed log-probability, is greedy) per (name, context, continuation), too long contexts cut on the left."""
        encoded = []
        for _name, context, continuation in requests:
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
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
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string; requests with the same settings are generated together."""
        settings = [_generation_settings(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        for wanted in dict.fromkeys(settings):
            members = [index for index, setting in enumerate(settings) if setting == wanted]
            until, length, temperature, top_k, top_p = wanted
            room = self.max_length - length
            if room < 1:
                raise InputError(
                    f"{length} new tokens do not fit the model's {self.max_length} positions: lower max_gen_toks"
                )
            prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in members]
            made = generate_tokens(self.model, prompts, length, temperature, top_k, top_p, batch_size=self.batch_size)
            for index, tokens in zip(members, made, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                for stop in until:
                    text = text.split(stop)[0]
                texts[index] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


Settings = tuple[tuple[str, ...], int, float, int | None, float | None]


def _generation_settings(wanted: dict[str, Any]) -> Settings:
    """(stop strings, new tokens, temperature, top_k, top_p) of a request; greedy unless it asks for samples."""
    until = wanted.get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    length = next((int(wanted[name]) for name in names if wanted.get(name) is not None), 256)
    temperature = float(wanted.get("temperature", 0.0))
    if temperature == 0 or wanted.get("do_sample") is False:
        return stops, length, 0.0, None, None
    return stops, length, temperature, wanted.get("top_k"), wanted.get("top_p")


def write_tasks(folder: Path, rows: Mapping[str, Sequence[Row]]) -> None:
    """Write the harness's own tasks into `folder`, changed in nothing but that they read these rows.

    Given to the harness as `include_path`, they take the place of its tasks of the same names: no network is needed.

    Args:
        rows: by task name, each with its task's columns (see `chai_jax.data.tasks.load_rows`).

    Raises:
        InputError: an unknown task.
    """
    built_in = Path(lm_eval.__file__).parent / "tasks"
    for name in rows:
        if name not in SOURCES:
            raise InputError(
                f"the task {name!r} has no counterpart in the harness; expected one of {', '.join(SOURCES)}"
            )
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        local = {
            "include": str(built_in / SOURCES[name]),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(path.absolute())}},
            "training_split": None,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(local), encoding="utf-8")  # JSON is YAML


def run(model: str, arguments: Sequence[str]) -> None:
    """`lm-eval run` on one of our models; `arguments` are the harness's own (`--tasks`, `--include_path`, ...).

    Raises:
        SystemExit: as the harness's command line does.
    """
    from lm_eval.__main__ import cli_evaluate

    # The harness has no other way in than the process's arguments.
    before = sys.argv
    chosen = ["--model", "chai-jax", "--model_args", json.dumps({"pretrained": model}), "--batch_size", "auto"]
    sys.argv = ["lm-eval", "run", *chosen, *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
