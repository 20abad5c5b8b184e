"""Which choice for which layer, so that a budget of bytes is met at the least cost: a Lagrangian, then what is left."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Choice:
    """Something a layer could become: its bytes, its cost in nats per token, and whatever says what it is."""

    size: int | float
    cost: float
    what: Any = None


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other beats in both size and cost, smallest first."""
    kept: list[Choice] = []
    for one in sorted(choices, key=lambda choice: (choice.size, choice.cost)):
        if not kept or one.cost < kept[-1].cost:
            kept.append(one)
    return kept


def allocate(layers: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """One choice per layer with sizes that sum to at most `budget` and costs that sum to as little as possible.

    For a price per byte each layer takes its cheapest choice (Everett 1963); the lowest price that meets the budget is
    found by bisection, and what it leaves over goes, step by step, where it saves most. Where even the smallest choices
    do not meet the budget, they are returned.
    """
    fronts = [frontier(choices) for choices in layers]
    sizes = [np.asarray([one.size for one in front], np.float64) for front in fronts]
    costs = [np.asarray([one.cost for one in front], np.float64) for front in fronts]

    def at_price(price: float) -> list[int]:
        return [int(np.argmin(cost + price * size)) for size, cost in zip(sizes, costs, strict=True)]

    def total(chosen: Sequence[int]) -> float:
        return sum(size[at] for size, at in zip(sizes, chosen, strict=True))

    chosen = [0] * len(fronts)
    low, high = -30.0, 30.0  # of the logarithm of the price
    for _ in range(60):
        middle = (low + high) / 2
        if total(at_price(np.exp(middle))) <= budget:
            high, chosen = middle, at_price(np.exp(middle))
        else:
            low = middle
    while (step := _best_step(sizes, costs, chosen, budget - total(chosen))) is not None:
        chosen[step[0]] = step[1]
    return [front[at] for front, at in zip(fronts, chosen, strict=True)]


def _best_step(
    sizes: Sequence[np.ndarray], costs: Sequence[np.ndarray], chosen: Sequence[int], room: float
) -> tuple[int, int] | None:
    """(layer, choice) of the upgrade within `room` bytes that lowers the cost most."""
    steps = [
        (costs[layer][at] - costs[layer][to], layer, to)
        for layer, at in enumerate(chosen)
        for to in range(at + 1, len(sizes[layer]))
        if sizes[layer][to] - sizes[layer][at] <= room
    ]
    gain, layer, to = max(steps, default=(0.0, 0, 0))
    return (layer, to) if gain > 0 else None
