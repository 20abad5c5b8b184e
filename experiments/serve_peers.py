"""Servers of one model beside each other, by one client: tokens/s and times at 1, 8 and 32 requests at once.

    python experiments/serve_peers.py $MODEL --seeds 0 --out runs/experiments --servers \
        "ours=taskset -c 0 chai-jax serve {model} --port {port}" \
        "transformers@{model}=taskset -c 0 transformers serve --host 127.0.0.1 --port {port}" \
        "llama.cpp=taskset -c 0 llama-server -m model.gguf --port {port} --parallel 32 -c 16384"

Every server is started `--rounds` times, in turn, alone on the machine, asked the same requests as the others at each
of `--at-once`, and ended. Give all the same CPUs, and the client another one (`taskset -c 1 python ...`). A request is
greedy and has a number of tokens at most; `--extra '{"ignore_eos": true}'` keeps a model from ending its text before,
where all servers know it. The figures are the median of the rounds, with the least and the largest.

Writes serve_peers.json, .csv, .md, and what each server printed to serve_peers_NAME.log.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from chai_jax.bench.load import Load
from chai_jax.bench.load_client import Server, check_library
from chai_jax.bench.load_figures import summary
from chai_jax.bench.load_prompts import Between, made_requests
from chai_jax.bench.load_run import send
from chai_jax.config.checks import require, require_count
from chai_jax.console import console, print_table
from chai_jax.errors import InputError
from chai_jax.report.tables import Column, number, terminal
from lab.options import Common, Record, start
from lab.publish import publish
from lab.servers import Peer, running

FIGURES = {
    "requests_per_second": ("requests_per_second", None),
    "new_tokens_per_second": ("new_tokens_per_second", None),
    "first_token_p50_ms": ("first_token_ms", "p50"),
    "first_token_p95_ms": ("first_token_ms", "p95"),
    "per_token_p50_ms": ("per_token_ms", "p50"),
    "latency_p95_ms": ("latency_ms", "p95"),
}


@dataclass(frozen=True)
class PeersOptions(Common):
    servers: Annotated[tuple[str, ...], arg(metavar="NAME=COMMAND ...")] = ()
    """How each server is started, with {port} and, if wanted, {model} in the command; NAME@MODEL=COMMAND if it knows
    the model by another name than MODEL."""
    at_once: Annotated[str, arg(metavar="N,...")] = "1,8,32"
    """Requests at once."""
    rates: Annotated[str, arg(metavar="RATE,...")] = ""
    """Instead: requests a second, which come whether or not others were answered (Poisson arrivals)."""
    requests: int = 4
    """Requests for each one at once: at 8 at once, 32 of them; with --rates, of each rate."""
    rounds: int = 3
    """Rounds in which every server has a turn."""
    prompt_tokens: Annotated[str, arg(metavar="LOW:HIGH")] = "32:256"
    """Words of a prompt."""
    new_tokens: Annotated[str, arg(metavar="LOW:HIGH")] = "64"
    """The most tokens to make."""
    extra: Annotated[str, arg(metavar="JSON")] = "{}"
    """More fields of every request."""
    chat: bool = False
    """Ask for chat completions."""
    patience: Annotated[float, arg(metavar="SECONDS")] = 900.0
    """Seconds in which a server must answer its first request."""

    @property
    def command(self) -> str:
        """As others have it; of absolute paths within the servers' commands the last part alone too."""
        return re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", super().command)

    def checked(self) -> tuple[list[Peer], list[float]]:
        """The servers, and how many requests are at once, or come in a second.

        Raises:
            InputError: none, two of one name, or a number that cannot be.
        """
        check_library()
        peers = [Peer.read(text, self.model[0]) for text in self.servers]
        if len(self.model) > 1 or not peers or len({peer.name for peer in peers}) < len(peers):
            raise InputError("expected one MODEL, and --servers of different names: 'ours=chai-jax serve ... {port}'")
        for name in ("requests", "rounds"):
            require_count(f"--{name}", getattr(self, name), 10**4)
        if self.rates:
            return peers, [float(word) for word in self.rates.split(",") if checked_rate(word)]
        words = self.at_once.split(",")
        good = all(word.isascii() and word.isdecimal() and 1 <= int(word) <= 4096 for word in words)
        require(good, "--at-once", self.at_once, "numbers from 1 to 4,096 with commas: 1,8,32")
        return peers, [int(word) for word in words]

    def fields(self) -> Record:
        """What `--extra` says."""
        try:
            extra = json.loads(self.extra)
        except ValueError:
            extra = None
        if not isinstance(extra, dict):
            raise InputError(f"--extra is {self.extra!r}; expected a JSON object")
        return extra


def checked_rate(word: str) -> bool:
    """True.

    Raises:
        InputError: it is no rate.
    """
    good = re.fullmatch(r"\d{1,5}(\.\d{1,4})?", word) is not None
    require(good and float(word) > 0, "--rates", word, "requests a second with commas: 0.5,2")
    return True


def measured(options: PeersOptions, server: Server, size: float, at: int, seed: int) -> Record:
    """The figures of the load number `at`. All servers get the same requests, and those of no two loads begin alike."""
    words = Between.read("--prompt-tokens", options.prompt_tokens)
    new = Between.read("--new-tokens", options.new_tokens)
    if options.rates:
        load = Load(rate=size, requests=options.requests, warm_up=8, seed=seed)
    else:
        load = Load(concurrency=int(size), requests=options.requests * int(size), warm_up=int(size), seed=seed)
    requests, warm = (made_requests(words, new, seed, 2 * at + part) for part in (0, 1))
    found, interrupted = send(replace(server, extra=options.fields()), load, requests, warm)
    if interrupted:
        raise KeyboardInterrupt
    return summary(load, found, False)


def turns(options: PeersOptions, peers: list[Peer], sizes: list[float]) -> Iterator[Record]:
    """One record a round, server and load. Each round begins with the next server."""
    for seed in options.seed_numbers:
        for turn in range(options.rounds):
            first = turn % len(peers)
            for peer in [*peers[first:], *peers[:first]]:
                log = options.out / f"serve_peers_{''.join(c if c.isalnum() else '_' for c in peer.name)}.log"
                with running(peer, options.chat, options.patience, log) as server:
                    for at, size in enumerate(sizes):
                        figures = measured(options, server, size, at, seed)
                        name = f"{size:g} a second" if options.rates else f"{size} at once"
                        console.print(f"{peer.name}, {name}: {figures['new_tokens_per_second'] or 0:.1f} tokens/s")
                        yield {"server": peer.name, "load": name, "seed": seed, "round": turn, **figures}


def joined(found: list[Record]) -> Iterator[Record]:
    """One row a server and load: the median of its rounds, with the least and the largest."""
    for server, load in dict.fromkeys((one["server"], one["load"]) for one in found):
        mine = [one for one in found if (one["server"], one["load"]) == (server, load)]
        row: Record = {"server": server, "load": load, "rounds": len(mine)}
        row |= {name: sum(one[name] for one in mine) for name in ("sent", "answered", "new_tokens")}
        for name, (group, part) in FIGURES.items():
            values = [value for one in mine if (value := one[group][part] if part else one[group]) is not None]
            low, middle, high = np.percentile(values, (0, 50, 100)).tolist() if values else (None, None, None)
            row[name] = {"median": middle, "least": low, "largest": high}
        row["client_limited"] = sum(one["client_limited"] for one in mine)
        yield row


def _spread(name: str, form: str) -> Any:
    def cell(row: Record) -> str:
        middle, low, high = (number(row[name][part], form) for part in ("median", "least", "largest"))
        return f"{middle} [{low}, {high}]"

    return cell


COLUMNS: tuple[Column, ...] = (
    ("server", lambda row: row["server"]),
    ("load", lambda row: row["load"]),
    ("answered / sent", lambda row: f"{row['answered']:,} / {row['sent']:,}"),
    ("tokens/s", _spread("new_tokens_per_second", ",.1f")),
    ("requests/s", _spread("requests_per_second", ",.2f")),
    ("first token p50, ms", _spread("first_token_p50_ms", ",.0f")),
    ("first token p95, ms", _spread("first_token_p95_ms", ",.0f")),
    ("per token p50, ms", _spread("per_token_p50_ms", ",.1f")),
    ("answer p95, ms", _spread("latency_p95_ms", ",.0f")),
)


def findings(rows: list[Record]) -> list[str]:
    """Ratios to the first server; what was not answered; where the client was the limit."""
    told = []
    for load in dict.fromkeys(row["load"] for row in rows):
        first, *others = [row for row in rows if row["load"] == load]
        base = first["new_tokens_per_second"]["median"]
        for row in others:
            mine = row["new_tokens_per_second"]["median"]
            if base and mine:
                ratio = f"{base / mine:.2f} times the tokens/s of {row['server']}"
                told.append(f"{load}: {first['server']} made {ratio}")
    for row in rows:
        where, missing, late = f"{row['server']}, {row['load']}", row["sent"] - row["answered"], row["client_limited"]
        told += [f"{where}: {missing} requests were not answered"] if missing else []
        told += [f"{where}: the client was late itself in {late} rounds"] if late else []
    return told


def experiment(options: PeersOptions) -> Record:
    peers, sizes = options.checked()
    options.fields()
    options.out.mkdir(parents=True, exist_ok=True)
    found = list(turns(options, peers, sizes))
    rows = list(joined(found))
    title = f"Servers beside each other, up to {options.new_tokens} new tokens after {options.prompt_tokens} words"
    print_table(terminal(rows, title, COLUMNS))
    return publish(options, "serve_peers", title, rows, COLUMNS, findings=findings(rows), turns=found)


if __name__ == "__main__":
    start(experiment, PeersOptions, __doc__)
