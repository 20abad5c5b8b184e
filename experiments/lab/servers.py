"""Servers as child processes: started by a command line with `{port}` in it, waited for, asked, and ended."""

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from chai_jax.bench.load_answers import Answer, Request
from chai_jax.bench.load_client import Server, connected
from chai_jax.errors import InputError

GRACE = 20.0  # seconds from SIGTERM to SIGKILL
TAIL = 300  # characters of a server's output in the message of its failure


@dataclass(frozen=True)
class Peer:
    """A server of a table.

    Attributes:
        name: of its rows.
        model: the model's name in requests to it.
        command: how it is started, `{port}` where its port stands.
    """

    name: str
    model: str
    command: str

    @classmethod
    def read(cls, text: str, model: str) -> "Peer":
        """The server that `NAME=COMMAND` or `NAME@MODEL=COMMAND` names; `{model}` in either is `model`.

        Raises:
            InputError: it is neither, or has no `{port}`.
        """
        label, equals, command = text.partition("=")
        name, at, asked = label.partition("@")
        if not (name and equals and "{port}" in command) or (at and not asked):
            raise InputError(
                f"--servers has {text!r}; expected NAME=COMMAND with {{port}} in it, or NAME@MODEL=COMMAND: "
                "'ours=chai-jax serve {model} --port {port}'"
            )
        return cls(name, (asked or model).replace("{model}", model), command.replace("{model}", shlex.quote(model)))


@contextmanager
def running(peer: Peer, chat: bool, patience: float, log: Path) -> Iterator[Server]:
    """A server that has answered one request; ended, with all its children, when the block ends.

    Args:
        patience: seconds in which it must answer.
        log: where what it prints is added.

    Raises:
        InputError: it cannot be started, ends, or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.replace("{port}", str(port)) for word in shlex.split(peer.command)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            raise InputError(f"{peer.name} cannot be started ({error}); expected a program: check --servers") from None
    server = Server(f"http://127.0.0.1:{port}/v1", peer.model, chat)
    try:
        asyncio.run(_answers(server, peer, process, patience, log))
        yield server
    finally:
        _end(process)


async def _answers(server: Server, peer: Peer, process: subprocess.Popen[bytes], patience: float, log: Path) -> None:
    """Wait until a request is answered to its end."""
    until, why = time.monotonic() + patience, "nothing yet"
    async with connected(server) as client:
        while time.monotonic() < until and process.poll() is None:
            answer = Answer(0, 1, client.clock())
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.1, until - time.monotonic())):
                    await client.ask(answer, Request("Once", 1))
            if answer.good:
                return
            why = f"{answer.outcome}: {answer.message}"
            if answer.outcome[0] == "4":
                break  # it is there, and does not want us
            await asyncio.sleep(0.25)
    ended = process.poll()
    said = f"ended with status {ended}" if ended is not None else f"gave no answer in {patience:g} s ({why})"
    printed = " ".join(log.read_text(errors="replace")[-TAIL:].split())
    raise InputError(f"{peer.name} {said}; expected a server: see {log.name}, which ends: {printed}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
