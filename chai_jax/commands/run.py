"""`chai-jax run`: the whole job."""

from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from chai_jax.commands.options import OptionalOutFolder
from chai_jax.config import RunConfig
from chai_jax.stopping import listening


@dataclass(frozen=True)
class RunCommand(RunConfig):
    """The whole job: cluster, distil, quantize and tune a model, and measure it after every stage."""

    model: Positional[str] = "toy"
    out: OptionalOutFolder = None

    def run(self) -> Any:
        """SIGTERM stops it at its next safe point: while it trains, with the state saved."""
        from chai_jax.run.devices import start

        execution = start(self.devices)
        with listening():
            from chai_jax.run.pipeline import run

            return run(self, execution)
