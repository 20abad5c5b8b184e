"""`chai-jax bench-serve`: a load of requests on any OpenAI-compatible server, and what became of them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from chai_jax.commands.options import OptionalOutFolder
from chai_jax.config.checks import require
from chai_jax.console import console, print_table
from chai_jax.errors import InputError
from chai_jax.inputs.reading import Record, parse_json

if TYPE_CHECKING:
    from chai_jax.bench.load import Load
    from chai_jax.bench.load_answers import Request
    from chai_jax.bench.load_client import Server

OURS = ("model", "prompt", "messages", "max_tokens", "stream")  # fields of a request that --extra may not set


@dataclass(frozen=True)
class BenchServeCommand:
    """Send requests to an OpenAI-compatible server: requests/s, tokens/s, time to first token."""

    address: Annotated[Positional[str], arg(metavar="ADDRESS")]
    """Of the server, such as http://127.0.0.1:8000/v1. It is asked directly, through no proxy."""
    model: Annotated[str, arg(metavar="NAME")]
    """The model's name there, as ADDRESS/models lists it."""
    rate: float | None = None
    """Open loop: requests a second, as a Poisson process, whether or not those before are answered. One of the two is
    needed."""
    concurrency: Annotated[int | None, arg(metavar="N")] = None
    """Closed loop: N requests at once; each answer makes room for the next."""
    requests: Annotated[int | None, arg(metavar="N")] = None
    """Requests to send (default: 100, or with --seconds as many as it takes)."""
    seconds: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Send requests for this long at most; then wait for the answers."""
    prompts: Annotated[Path | None, arg(metavar="FILE")] = None
    """Prompts, one a line, or .jsonl with a field `prompt`; taken in turn, and again from the first."""
    prompt_tokens: Annotated[str | None, arg(metavar="LOW:HIGH")] = None
    """Instead of a file: prompts of so many common words, all numbers alike, which are about as many tokens
    (default: 32:256)."""
    new_tokens: Annotated[str, arg(metavar="LOW:HIGH")] = "16:128"
    """The most tokens to make (`max_tokens`), all numbers alike. A model may end its text before."""
    chat: bool = False
    """Ask ADDRESS/chat/completions; the prompt is a user's message. Else ADDRESS/completions."""
    api_key: Annotated[str | None, arg(metavar="KEY")] = None
    """Sent as the bearer token; in no file."""
    extra: Annotated[str | None, arg(metavar="JSON")] = None
    """More fields of every request, such as '{"ignore_eos": true}'; null takes away one that is sent else:
    `temperature` (0), `stream_options` (tells the numbers of tokens)."""
    timeout: Annotated[float, arg(metavar="SECONDS")] = 600.0
    """Give a request up after this long."""
    warm_up: Annotated[int, arg(metavar="N")] = 1
    """Requests to send before, N at once of a closed loop, which are not counted."""
    seed: int = 0
    """Seed of arrivals, prompts and numbers of tokens."""
    out: OptionalOutFolder = None
    """A new folder for load.json (settings, machine, every request) and load.csv (every request)."""

    def run(self) -> Any:
        from chai_jax.bench.load_client import check_library
        from chai_jax.bench.load_figures import COLUMNS, TOTALS, rows, summary, totals
        from chai_jax.bench.load_run import machine, send
        from chai_jax.files.atomic import claim_folder, finite, write_json, write_text
        from chai_jax.report.tables import as_csv, terminal

        check_library()
        server, load = self._server(), self._load()
        requests, warm = self._requests(load.warm_up)
        if self.out is not None:
            claim_folder(self.out)
        measured, interrupted = send(server, load, requests, warm)
        figures = summary(load, measured, interrupted)
        settings = {**asdict(load), "address": server.base, "model": self.model, "chat": self.chat, **self._lengths()}
        record = {"settings": settings, "machine": machine(), **figures}
        if self.out is not None:
            answers = [answer.to_json(measured.began) for answer in measured.answers]
            write_json(self.out / "load.json", finite({**record, "answers": answers}))
            write_text(self.out / "load.csv", as_csv(answers))
        if not (figures["answered"] or interrupted):
            raise InputError(f"no request was answered to its end: {'; '.join(figures['notes'])}")
        how = f"{load.rate:g} requests/s, open loop" if load.rate else f"{load.concurrency} at once, closed loop"
        print_table(terminal(rows(figures), f"chai-jax bench-serve, {self.model}: {how}, seed {load.seed}", COLUMNS))
        print_table(terminal(totals(figures), "", TOTALS))
        for note in figures["notes"]:
            console.print(f"note: {note}")
        return record

    def _server(self) -> "Server":
        from chai_jax.bench.load_client import Server, base_of

        key = self.api_key
        require(bool(self.model) and len(self.model) < 1000, "--model", self.model, "the model's name at the server")
        plain = key is None or (key.isascii() and key.isprintable() and " " not in key and 0 < len(key) < 2**12)
        if not plain:
            raise InputError("--api-key cannot be sent; expected ASCII letters without blanks")
        require(1e-3 <= self.timeout <= 1e6, "--timeout", self.timeout, "from 0.001 to 1,000,000 seconds")
        return Server(base_of(self.address), self.model, self.chat, key, self._extra(), self.timeout)

    def _extra(self) -> Record:
        try:
            extra = parse_json(self.extra) if self.extra is not None else {}
        except ValueError:
            extra = None
        if not isinstance(extra, dict) or any(name in extra for name in OURS):
            raise InputError(f"--extra is {self.extra!r}; expected a JSON object without {', '.join(OURS)}")
        return extra

    def _load(self) -> "Load":
        from chai_jax.bench.load import Load

        requests = 100 if self.requests is None and self.seconds is None else self.requests
        load = Load(self.rate, self.concurrency, requests, self.seconds, self.warm_up, self.seed)
        load.check()
        return load

    def _lengths(self) -> Record:
        """What is asked for, as the record says it."""
        made = (self.prompt_tokens or "32:256") if self.prompts is None else None
        about = {"prompts": self.prompts and self.prompts.name, "prompt_tokens": made, "new_tokens": self.new_tokens}
        return {**about, "extra": self._extra(), "timeout": self.timeout}

    def _requests(self, warm_up: int) -> tuple[Iterator["Request"], Iterator["Request"]]:
        """Those of the load, and those before it, which are others."""
        from chai_jax.bench.load_prompts import Between, made_requests, read_prompts, read_requests

        new = Between.read("--new-tokens", self.new_tokens)
        if self.prompts is None:
            words = Between.read("--prompt-tokens", self.prompt_tokens or "32:256")
            return made_requests(words, new, self.seed, 1), made_requests(words, new, self.seed, 2)
        if self.prompt_tokens is not None:
            raise InputError("--prompts and --prompt-tokens are given; expected one of them")
        found = read_prompts(self.prompts)
        first = warm_up % len(found)
        return read_requests([*found[first:], *found[:first]], new, self.seed, 1), read_requests(
            found, new, self.seed, 2
        )
