"""What was timed in turn, as rows: times, rates, ratios round by round, and floors."""

from dataclasses import asdict
from typing import Any

from chai_jax.bench.floor import Rates, least_work
from chai_jax.bench.race import interleaved, percentiles
from chai_jax.bench.sweep import throughput
from chai_jax.model.model import Model
from lab.options import Record


def in_turn(ready: dict[str, Any], count: int) -> dict[str, Any]:
    """Milliseconds of every round."""
    found = interleaved({name: one.lap for name, one in ready.items()}, count)
    return {name: laps[:, 0] for name, laps in found.items()}


def row_of(name: str, one: Any, model: Model, rounds: dict[str, Any], measure: str, rates: Rates, each: int) -> Record:
    """What was timed of one, beside its floor and the others; `each` of the unit were made in a lap's milliseconds."""
    floor, ms = least_work(model, one.shape)[measure].floor(rates), percentiles(rounds[name])
    return {
        "cache": name,
        "framework": one.framework,
        "batch": one.shape.batch,
        "n": len(rounds[name]),
        "ms": ms,
        "rate": throughput(each, ms),
        "times": {other: percentiles(laps / rounds[name]) for other, laps in rounds.items() if other != name},
        "floor": floor,
        "floor_fraction": floor["ms"] / ms["median"],
        "bytes": one.bytes,
        "probe": asdict(rates),
    }
