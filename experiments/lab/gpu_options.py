"""The options of `bench_gpu.py`, and what it refuses before it measures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chai_jax.errors import InputError
from chai_jax.files.published import architecture_of
from chai_jax.plans.formats import UNFITTED
from chai_jax.run.devices import require_backend
from lab.options import command_line

PARTS = ("decode", "prompt", "score", "largest")


@dataclass(frozen=True)
class GpuOptions:
    model: str = "facebook/opt-1.3b"
    """Shape that decodes: a published one, or a folder with a config.json."""
    score_model: str = "facebook/opt-125m"
    """Shape that answers questions, likewise."""
    parts: str = ",".join(PARTS)
    """What to measure, with commas."""
    batch: int = 64
    """Sequences that decode at once."""
    start: int = 1920
    """Columns of the cache that are in use when decoding begins."""
    steps: int = 128
    """Decoding steps of a round."""
    prompt_batch: int = 8
    """Prompts, of as many tokens, that are read at once."""
    score_batches: str = "64,128,256,512,1024"
    """Questions answered at once, with commas."""
    question: int = 48
    """Tokens of a question."""
    share: Literal["qk", "qkv"] = "qkv"
    """What the heads of a cluster share in the compressed model."""
    clusters: float = 0.5
    """Its clusters, as a fraction of the heads."""
    storage: str = "int8"
    """Its cache's format, such as int8 or k4v4."""
    rounds: int = 9
    """Rounds; medians with their 10th and 90th percentile are reported."""
    peer: bool = True
    """Time transformers beside ours."""
    memory: float | None = None
    """GiB that the largest batch may take (default: what JAX may take of the device)."""
    found: str | None = None
    """Largest batches, dense and compressed, as `chai-jax aot --largest-batch` found them: run without a search."""
    anywhere: bool = False
    """Measure on whatever JAX finds, a GPU or not."""
    seed: int = 0
    """Seed of weights and inputs."""
    out: Path = Path("runs/experiments")
    """Folder of the tables."""

    @property
    def command(self) -> str:
        return command_line({})

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        return (self.seed,)

    def check(self) -> None:
        """Raise InputError unless this can be measured here."""
        if not self.anywhere:
            try:
                require_backend("gpu")
            except InputError as error:
                raise InputError(f"{str(error).partition('; ')[2]}, or give --anywhere") from None
        if self.storage not in UNFITTED:
            raise InputError(f"--storage is {self.storage!r}; expected one of {', '.join(UNFITTED)}")
        for name in ("batch", "start", "steps", "prompt_batch", "question", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        positions = architecture_of(self.model).max_positions
        if self.start + self.steps > positions:
            raise InputError(f"--start {self.start} and --steps {self.steps} do not fit {positions} positions")
