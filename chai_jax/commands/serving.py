"""`chai-jax serve`: a model behind an address."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from chai_jax.config import DeviceConfig
from chai_jax.errors import InputError

SHARE = 0.8  # of the free memory that the cache takes, where nothing else is asked for: programs need some too
USUAL_CONTEXT = 2048
LIBRARIES = ("h11", "prometheus_client", "starlette", "uvicorn")


@dataclass(frozen=True)
class ServeCommand:
    """Answer OpenAI clients: many requests at once, as many as the memory for the cache holds.

    Prints what the cache holds, then the address. SIGTERM ends it, once running requests have."""

    model: Positional[str]
    """Hub id, folder, or `toy`."""
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen at. Others than 127.0.0.1 are reached from other machines: give --api-key too."""
    port: int = 8000
    """Port; 0 takes one that is free."""
    name: Annotated[str | None, arg(metavar="NAME")] = None
    """What clients call the model (default: the last part of MODEL)."""
    storage: Annotated[str | None, arg(metavar="FORMAT")] = None
    """Of a model that was not compressed: store its cache in this format (default: bfloat16)."""
    adaptive: Annotated[str | None, arg(metavar="FORMAT,...")] = None
    """Store the cache in the first of these formats, such as bfloat16,int8,int4; turn to the next where requests wait
    and memory is full, and back when it is quiet."""
    kv_memory: Annotated[str | None, arg(metavar="SIZE")] = None
    """Memory for the cache, such as 4GiB (default: four fifths of what is free)."""
    context: int | None = None
    """Tokens of a request, prompt and answer (default: the model's positions, at most 2048)."""
    slots: int | None = None
    """Requests that are answered at once, at most (default: as many as the memory holds, at most 256)."""
    prefixes: int = 2
    """How many beginnings that prompts share are kept; each takes the memory of one request."""
    queue: int = 256
    """Requests that may wait; more are refused with status 503."""
    time_limit: Annotated[float | None, arg(metavar="SECONDS")] = None
    """Seconds a request may take, waiting included; then it ends with status 504 (default: as long as it takes)."""
    grace: Annotated[float, arg(metavar="SECONDS")] = 30.0
    """Seconds that running requests may go on for after SIGTERM."""
    api_key: Annotated[str | None, arg(metavar="KEY|@FILE")] = None
    """What clients must send as a bearer token, or @FILE that holds it."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute in this dtype, whatever is stored (default: bfloat16 on TPUs and GPUs, float32 on CPUs)."""
    require_backend: Literal["tpu", "gpu", "cpu"] | None = None
    """Stop unless JAX computes on this."""
    compile_cache: Path | None = None
    """Keep compiled programs in this folder: the next start is quicker."""

    def run(self) -> Any:
        self.check()
        from chai_jax.server.run import serve
        from chai_jax.server.settings import ServerSettings

        settings = ServerSettings(
            name=self.name or Path(self.model).name,
            host=self.host,
            port=self.port,
            api_key=self.key(),
            seconds=self.time_limit,
            grace=self.grace,
        )
        engine = self.engine()
        serve(engine, settings)
        status = engine.status()
        return {"read": status.read, "made": status.made, "seconds": round(status.seconds, 1)}

    def check(self) -> None:
        """Raise InputError where a library is missing or a number is out of range, before anything is loaded."""
        missing = [name for name in LIBRARIES if find_spec(name) is None]
        if missing:
            raise InputError(f"serve needs {', '.join(missing)}, not installed here; install the extra chai_jax[serve]")
        least = {"--slots": (self.slots, 1), "--prefixes": (self.prefixes, 0), "--queue": (self.queue, 1)}
        for option, (value, bound) in least.items():
            if value is not None and value < bound:
                raise InputError(f"{option} is {value}; expected at least {bound}")
        for option, seconds in (("--time-limit", self.time_limit), ("--grace", self.grace)):
            if seconds is not None and not 0 <= seconds < 1e9:
                raise InputError(f"{option} is {seconds}; expected seconds, from 0")
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"--port is {self.port}; expected 0 to 65535")
        if self.storage is not None and self.adaptive is not None:
            raise InputError("--storage and --adaptive are both given; expected one: --adaptive names the formats")

    def key(self) -> str | None:
        """The key that clients must send."""
        if self.api_key is None or not self.api_key.startswith("@"):
            return self.api_key
        from chai_jax.inputs.paths import user_path
        from chai_jax.inputs.reading import read_text

        return read_text(user_path(self.api_key[1:])).strip()

    def engine(self) -> Any:
        """The engine of the model, which has compiled all that it needs."""
        from chai_jax.console import console
        from chai_jax.machine.memory import free_bytes, parse_bytes
        from chai_jax.model.execution import Execution
        from chai_jax.model.sharding import one_device
        from chai_jax.plans.formats import UNFITTED
        from chai_jax.run.devices import start
        from chai_jax.run.options import parse_list
        from chai_jax.serve.engine import Engine

        start(DeviceConfig(dtype=self.dtype, require_backend=self.require_backend, compile_cache=self.compile_cache))
        adaptive = tuple(parse_list("--adaptive", self.adaptive, UNFITTED)) if self.adaptive else ()
        limit = None if self.kv_memory is None else parse_bytes("--kv-memory", self.kv_memory)
        model = self.opened(Execution.choose(self.dtype, one_device()))
        if limit is None:
            free = free_bytes()
            if free is None:
                raise InputError("nothing says how much memory is free here; expected --kv-memory, such as 4GiB")
            limit = int(SHARE * free)
        context = self.context or min(model.config.context, USUAL_CONTEXT)
        engine = Engine(model, limit, context, self.slots, self.prefixes, self.queue, adaptive)
        for line in described(engine):
            console.print(line)
        engine.start()
        return engine

    def opened(self, execution: Any) -> Any:
        """The model, its cache in the format that was asked for."""
        from chai_jax.compress.quantize import with_storage
        from chai_jax.data.tokens import require_tokenizer
        from chai_jax.sources import open_model

        model = open_model(self.model, execution=execution)
        require_tokenizer(model.tokenizer, self.model)
        if self.adaptive is not None:
            return model
        if model.plan is None and model.spec.is_dense:
            return with_storage(model, self.storage or "bfloat16")
        if self.storage is not None:
            raise InputError(f"{self.model} was compressed, which says how its cache is stored: leave out --storage")
        return model


def described(engine: Any) -> list[str]:
    """What the memory holds, a line for each format that the cache may be stored in."""
    from chai_jax.serve.capacity import dense_slots, each_token

    lines = []
    for of, batch in zip(engine.rooms, engine.batches, strict=True):
        dense = dense_slots(engine.model, of)
        lines.append(
            f"cache: {of.slots} requests of {of.context} tokens in {of.limit / 2**20:,.0f} MiB, stored as "
            f"{batch.format} ({each_token(batch.model):,.0f} bytes a token); the dense model in bfloat16 would have "
            f"{dense}"
        )
    return lines
