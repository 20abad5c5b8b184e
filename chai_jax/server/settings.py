"""What a server is told once, and the engine that it stands in front of."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from chai_jax.serve.job import Listener, Status, Ticket, Wanted

MIB = 2**20


@runtime_checkable
class Engine(Protocol):
    """What the server needs of an engine (see `chai_jax.serve.job` for what goes in and out)."""

    @property
    def model(self) -> Any:
        """A `Model`: `tokenizer`, `source`, `generation` and `config` are looked at."""

    def submit(self, wanted: Wanted, listen: Listener, seconds: float | None = None) -> Ticket:
        """`listen` is called from the engine's own thread. Raises InputError, Full, Closing."""

    def status(self) -> Status: ...

    def close(self, grace: float) -> None:
        """Blocks until nothing runs: at most `grace` seconds, and what is left ends with `cut`."""


@dataclass(frozen=True)
class ServerSettings:
    """Attributes:
    name: what clients call the model; never a path.
    host, port: where to listen; port 0 takes one that is free.
    api_key: what clients must send as `Authorization: Bearer KEY`; None: nothing.
    seconds: that a request may take, waiting included; None: as long as it takes.
    grace: seconds that requests may go on for once the server is told to end.
    body_bytes: of a request's body, at most; tokenizing a MiB takes seconds, during which other prompts wait.
    body_seconds: for its body to arrive.
    connections: open at once, at most.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    seconds: float | None = None
    grace: float = 30.0
    body_bytes: int = MIB
    body_seconds: float = 30.0
    connections: int = 1000
