"""`chai-jax evaluate`, `generate`, `verify` and `export`: what one does with a model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from chai_jax.commands.options import OptionalOutFolder, OutFolder
from chai_jax.config import DeviceConfig
from chai_jax.errors import InputError


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a model on tasks as the lm-evaluation-harness does, or measure its perplexity on a text."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    task: Annotated[str | None, arg(metavar="TASK,...")] = None
    """Tasks to score on: sst2, rte, piqa, hellaswag, toy, or files NAME.yaml that describe one."""
    text: Path | None = None
    """Instead of a task: measure token perplexity on this text file."""
    data_dir: Path | None = None
    """Folder with TASK/validation.jsonl, or .jsonl.gz (default: the Hugging Face hub)."""
    split: Literal["validation", "train"] = "validation"
    """Which split to score."""
    baseline: str | None = None
    """Compare with this model, example by example: paired differences and flips."""
    window: int | None = None
    """With --text: tokens read at once (default: the model's positions, at most 2048)."""
    limit: int | None = None
    """Score only the first N examples, or windows of the text."""
    out: OptionalOutFolder = None
    """Write the answer to every example to samples_TASK.jsonl, or the loss of every window to samples_text.jsonl, in
    this folder."""
    revision: str | None = None
    """Revision of a hub model."""
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.data.tasks import TASKS, get_tasks
        from chai_jax.evaluation.tasks import evaluate, evaluate_text
        from chai_jax.files.atomic import check_writable
        from chai_jax.machine.processes import once
        from chai_jax.run.devices import start
        from chai_jax.sources import open_model

        execution = start(self.devices)
        if (self.task is None) == (self.text is None):
            raise InputError(
                f"give either --task ({', '.join(TASKS)}, files NAME.yaml; several with commas) or --text FILE"
            )
        tasks = [] if self.task is None else get_tasks("--task", self.task)
        if self.out is not None:
            check_writable(self.out)
        model = open_model(self.model, self.revision, execution=execution)
        baseline = None if self.baseline is None else open_model(self.baseline, execution=execution)
        if self.text is not None:
            read = evaluate_text(model, self.text, self.window, self.limit, baseline)
            if self.out is not None:
                once(partial(read.write_samples, self.out / "samples_text.jsonl"))
            return {str(self.text): read.metrics()}
        found = {}
        for task in tasks:
            result = evaluate(model, task, self.split, self.data_dir, self.limit, baseline)
            if self.out is not None:
                once(partial(result.write_samples, self.out / f"samples_{task.name}.jsonl"))
            found[task.name] = result.metrics() | task.about
        return found


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt, or answer it. The text appears as it is made."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    prompt: Annotated[str, arg(metavar="TEXT")] = ""
    """What to continue."""
    chat: bool = False
    """Take the prompt as a user's message, by the model's chat template, and make the answer."""
    system: str | None = None
    """With --chat: a message before the user's that says how to answer."""
    max_new_tokens: int = 40
    """The most tokens to make."""
    temperature: float | None = None
    """Temperature of sampling; 0 is greedy (default: as the model's generation_config.json says, else greedy)."""
    top_k: int | None = None
    """Sample from the k likeliest tokens; 0 or -1: from all."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with at least this probability (nucleus)."""
    seed: int = 0
    """Seed of the sampling."""
    draft: str | None = None
    """Speculative decoding: this smaller or compressed model, with the same vocabulary, proposes tokens that MODEL
    checks. Greedy text stays the same; sampled text keeps its distribution."""
    draft_tokens: int = 4
    """With --draft: how many tokens it proposes at a time."""
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def run(self) -> Any:
        from chai_jax.data.tokens import check_characters
        from chai_jax.run.devices import start
        from chai_jax.serve.generate import stream
        from chai_jax.serve.request import check_numbers
        from chai_jax.serve.sample import Sampling
        from chai_jax.serve.speculate import stream_with_draft
        from chai_jax.sources import open_model

        execution = start(self.devices)
        check_characters(self.prompt, "--prompt")
        check_characters(self.system or "", "--system")
        if self.system is not None and not self.chat:
            raise InputError("--system is given without --chat; expected both: add --chat")
        check_numbers(self.max_new_tokens, self.seed)
        if self.temperature is not None:
            Sampling.checked(self.temperature, self.top_k, self.top_p)
        model = open_model(self.model, execution=execution)
        asked = (self.prompt, self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed)
        told: dict[str, Any] = {}
        pieces: list[str] = []

        def drafted(draft: str) -> Iterator[str]:
            smaller = open_model(draft, execution=execution)
            for piece, made in stream_with_draft(model, smaller, *asked, self.draft_tokens, self.chat, self.system):
                told.update(rounds=made.rounds, proposed=made.proposed, acceptance=made.acceptance)
                yield piece

        making = stream(model, *asked, self.chat, self.system) if self.draft is None else drafted(self.draft)
        for piece in making:
            # A prompt that is continued comes with the first piece: bad input is found out before anything is printed.
            print(piece if pieces or self.chat else self.prompt + piece, end="", flush=True)
            pieces.append(piece)
        print()
        return {"prompt": self.prompt, "completion": "".join(pieces), **told}


@dataclass(frozen=True)
class VerifyCommand:
    """Compare two models: the largest logit difference and the KL of their next-token distributions."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    other: Positional[str]
    """The model to compare it with, likewise."""

    def run(self) -> Any:
        from chai_jax.evaluation.verify import verify
        from chai_jax.sources import open_model

        return verify(open_model(self.model), open_model(self.other))


@dataclass(frozen=True)
class ExportCommand:
    """Write a model as an ordinary one in Hugging Face layout, for torch and other engines.

    A model made with --kv-heads keeps its few heads; other clustered heads are expanded."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    out: OutFolder
    """A new folder."""

    def run(self) -> Any:
        from chai_jax.compress.expand import ordinary
        from chai_jax.files.atomic import claim_folder
        from chai_jax.files.export import export
        from chai_jax.sources import open_model

        claim_folder(self.out)
        model = open_model(self.model)
        export(ordinary(model), self.out)
        return {"out": str(self.out), "files": sorted(path.name for path in self.out.iterdir())}
