"""`chai-jax bench`: who is timed, at which shapes, and what is said of each: one row an entrant and shape."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from typing import Any

import jax

from chai_jax.bench.floor import Rates, least_work, probe_rates
from chai_jax.bench.peers import PEERS
from chai_jax.bench.race import Build, Shape, Timed, check_comparable, race
from chai_jax.compress.cluster import cluster
from chai_jax.compress.expand import expand
from chai_jax.compress.quantize import quantize, with_storage
from chai_jax.console import console
from chai_jax.errors import InputError
from chai_jax.inputs.reading import Record
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.model import Model
from chai_jax.plans.planned import uniform_plan

OURS = "chai_jax"
PROMPTS = (32, 512)  # where none are asked for
LOOK = 0.25  # seconds of each part of a probe between two laps


@dataclass(frozen=True)
class Entrant:
    """Something to time: a model in a framework.

    Attributes:
        model: what it computes, as it computes it: of a peer, the dense model with a float32 cache.
        build: makes it ready for a shape.
    """

    name: str
    model: Model
    build: Build
    framework: str = OURS

    def facts(self) -> Record:
        """What tells it from others. `heads` are those that keys are cached of, `clusters` the mean of them that are
        left in a layer (dense: all)."""
        layers = self.model.spec.layers
        return {
            "model": self.name,
            "framework": self.framework,
            "layers": len(layers),
            "clustered_layers": sum(layer.share != "dense" for layer in layers),
            "heads": self.model.config.kv_heads,
            "clusters": sum(layer.key_heads for layer in layers) / len(layers),
            "kv_bytes_per_token": bytes_per_token(self.model.spec),
        }


def ours(name: str, model: Model) -> Entrant:
    return Entrant(name, model, partial(Timed, model))


def peer(kind: str, name: str, model: Model, threads: int) -> Entrant:
    """A model as another framework runs it (see `chai_jax.bench.peers`): whole, whatever was clustered."""
    dense = with_storage(expand(model), "float32")
    return Entrant(f"{kind} {name}", dense, PEERS[kind](model, threads), PEERS[kind].framework)


def variants(name: str, model: Model, fractions: Iterable[float], share: str, storage: str | None) -> list[Entrant]:
    """A dense model, compressed as a plan would: every layer in this fraction of its heads, neighbours merged.

    For time and bytes alone, which depend on how many clusters there are and not on which heads are in them.

    Args:
        storage: cache format of the variants; None: the model's own.
    """
    found = []
    for fraction in fractions:
        plan = uniform_plan(model.config, share, fraction, storage or model.spec.layers[0].storages[0])
        small = quantize(cluster(model, plan), plan)
        found.append(ours(" ".join([name, share, f"{fraction:g}", *([storage] if storage else [])]), small))
    return found


def shapes(models: Sequence[Model], batches: Sequence[int], prompts: Sequence[int], rest: Shape) -> list[Shape]:
    """Every batch with every prompt length; without any lengths, `PROMPTS`, cut to what the position tables allow.

    Args:
        rest: what else there is to a shape.

    Raises:
        InputError: the models are not comparable, or a shape does not fit the shortest position table.
    """
    check_comparable(models)
    positions = min(model.config.max_positions for model in models)
    room = positions - rest.new_tokens
    prompts = prompts or sorted({min(prompt, max(room, 1)) for prompt in PROMPTS})
    if max(prompts) > room or rest.question > positions:
        raise InputError(
            f"a prompt of {max(prompts)} with {rest.new_tokens} new tokens, or a question of {rest.question}, does not "
            f"fit {positions} positions, the fewest of these models: choose smaller ones"
        )
    return [dataclasses.replace(rest, batch=batch, prompt=prompt) for batch, prompt in product(batches, prompts)]


def sweep(entrants: Sequence[Entrant], over: Sequence[Shape], trials: int, seed: int, tokens: int = 0) -> Record:
    """Race the entrants at every shape and set the times beside the floors that a probe of this machine gives.

    Returns:
        `probe`: the rates that the floors are computed from. On CPUs it is the median of a short `probe_rates` in every
        round, since a shared machine's speed changes by the minute. Elsewhere a probe would take memory from the
        models: there it is the better of one before and one after. `probe_best`: the best rates of all probes. `rows`:
        see `_row`. `peak_device_bytes`: the most that was in use on the first device, all models together (None where
        the backend does not say).

    Raises:
        InputError: see `race`.
    """
    timed: list[dict[str, Record]] = []
    dtype = entrants[0].model.how.dtype
    probes: list[Rates] = []

    def look(seconds: float) -> None:
        probes.append(probe_rates(dtype, seconds=seconds))

    shared = jax.default_backend() == "cpu"
    beside = partial(look, LOOK) if shared else None
    if not shared:
        look(1.0)
    for number, shape in enumerate(over):
        console.print(f"shape {number + 1} of {len(over)}: {shape}", highlight=False)
        timed.append(race({one.name: one.build for one in entrants}, shape, dtype.name, trials, seed, tokens, beside))
    memory = jax.devices()[0].memory_stats() or {}
    if not shared:
        look(1.0)
    best = reduce(Rates.best, probes)
    rates = Rates.typical(probes) if shared else best
    rows = [
        _row(one, shape, found[one.name], rates) for shape, found in zip(over, timed, strict=True) for one in entrants
    ]
    return {
        "probe": dataclasses.asdict(rates),
        "probe_best": dataclasses.asdict(best),
        "probes": len(probes),
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
        "rows": rows,
    }


def _row(entrant: Entrant, shape: Shape, timed: Record, rates: Rates) -> Record:
    """What was timed, with `tokens_per_second` while decoding and `inferences_per_second` (scored examples); for each
    of `MEASURES` the `floor` and `floor_fraction`, the part of the median that the floor is."""
    floors = {name: work.floor(rates) for name, work in least_work(entrant.model, shape).items()}
    return {
        **entrant.facts(),
        **timed,
        "tokens_per_second": throughput(shape.batch, timed["decode_ms_per_token"]),
        "inferences_per_second": throughput(1, timed["score_ms_per_example"]),
        "floor": floors,
        "floor_fraction": {name: floor["ms"] / timed[name]["median"] for name, floor in floors.items()},
    }


def throughput(count: int, milliseconds: dict[str, float]) -> dict[str, float]:
    """`count` in so many milliseconds, as a rate a second: the slowest tenth of times are the lowest rates."""
    ends: dict[str, Any] = {"median": "median", "p10": "p90", "p90": "p10"}
    return {name: 1e3 * count / milliseconds[time] for name, time in ends.items()}
