"""A plan measured as a whole, and made again where its layers together do other damage than one by one.

Costs are measured one layer at a time, and add up only as long as they are small: what a layer does to a model whose
other layers are changed too may be several times as much.
"""

import dataclasses
from pathlib import Path

import numpy as np

from chai_jax.analyse.budget import Budget, parts, plan_within
from chai_jax.analyse.damage import Damage
from chai_jax.analyse.probe import Probe
from chai_jax.compress.basis_stream import sharing_programs
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.console import console
from chai_jax.model.model import Model
from chai_jax.plans.plan import Plan

MISSED = 1.5  # a prediction that is exceeded by this factor is missed
REACH = 8.0  # a layer's costs are multiplied by this at most, and divided by it
SMALL = 1e-6  # nats, and part of a plan's: below is rounding


def plan_and_measure(
    model: Model,
    probe: Probe,
    budget: Budget,
    *,
    score_merge: str = "low_rank",
    value_merge: str = "low_rank",
    seed: int = 0,
    file: Path | None = None,
) -> Plan:
    """`plan_within`, and the KL of its plan as a whole, on the same text, as `Plan.measured`.

    Where that exceeds the prediction by more than half, the costs of each layer are multiplied by what it does within
    the plan (the part of the KL that goes when it alone is left dense) over what was predicted, and a second plan is
    made of these. The better of the two is returned.

    Args, errors: as of `plan_within`.
    """
    merges = {"score_merge": score_merge, "value_merge": value_merge}

    def made(scales: tuple[float, ...] = ()) -> Plan:
        return plan_within(model, probe, budget, **merges, seed=seed, file=file, scales=scales)

    def carried_out(plan: Plan) -> Model:
        return sharing_programs(quantize(cluster(model, plan, fit), plan, fit))

    first = made()
    fit, text = parts(model.config, probe, budget)
    damage, changed = Damage(model, *text), carried_out(first)
    kl = damage.of_model(changed)[0]
    first = dataclasses.replace(first, measured=kl)
    if first.predicted is None or kl <= MISSED * max(first.predicted, SMALL):
        return first
    console.print(f"The plan does {kl:.2g} nats of damage instead of {first.predicted:.2g}: it is made again")
    second = made(in_place(damage, changed))
    again = damage.of_model(carried_out(second))[0]
    return dataclasses.replace(second, measured=again) if again < kl else first


def in_place(damage: Damage, changed: Model) -> tuple[float, ...]:
    """By layer of a model whose layers all may differ: what it does there over what it does alone, within `REACH`."""
    kl, within = damage.within(changed)
    layers = enumerate(changed.spec.layers)
    alone = np.asarray([damage.of(at, layer, changed.params["layers"][str(at)])[0] for at, layer in layers])
    least = SMALL * max(kl, SMALL)
    return tuple(np.clip(np.maximum(within, least) / np.maximum(alone, least), 1 / REACH, REACH).tolist())
