"""The allocation against trying everything."""

import itertools

import numpy as np
import pytest

from chai_jax.analyse.allocate import Choice, allocate, frontier


def random_layers(seed: int, layers: int, choices: int) -> list[list[Choice]]:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 100, (layers, choices)).tolist()
    # Costs fall with size, unevenly, as ranks and clusters do.
    costs = [[float(random.exponential() * np.exp(-size / 20)) for size in row] for row in sizes]
    return [[Choice(*pair) for pair in zip(*rows, strict=True)] for rows in zip(sizes, costs, strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_close_to_the_best_of_all_mixtures_and_never_over(seed: int) -> None:
    layers = random_layers(seed, 4, 7)
    smallest = float(sum(min(choice.size for choice in layer) for layer in layers))
    worst = max(choice.cost for layer in layers for choice in layer)
    for budget in (smallest, smallest + 20, smallest + 60, smallest + 150):
        mixtures = [mix for mix in itertools.product(*layers) if sum(one.size for one in mix) <= budget]
        best = min(sum(one.cost for one in mix) for mix in mixtures)
        found = allocate(layers, budget)
        assert sum(one.size for one in found) <= budget
        # A Lagrangian misses what lies inside the convex hull: at most one layer's step of it.
        assert sum(one.cost for one in found) <= best + 0.25 * worst


def test_everything_fits() -> None:
    layers = random_layers(0, 3, 5)
    found = allocate(layers, 1e9)
    assert [one.cost for one in found] == [min(choice.cost for choice in layer) for layer in layers]


def test_nothing_fits_gives_the_smallest() -> None:
    layers = random_layers(1, 3, 5)
    assert [one.size for one in allocate(layers, 0.0)] == [min(one.size for one in layer) for layer in layers]


def test_what_no_price_reaches_goes_where_it_saves_most() -> None:
    """Choices inside the convex hull: at the price of 1/2 both layers would be whole, and above it both smallest."""
    one = [Choice(0, 10.0), Choice(10, 9.0), Choice(20, 0.0)]
    other = [Choice(0, 10.0), Choice(10, 8.0), Choice(20, 0.0)]
    assert [choice.cost for choice in allocate([one, other], 10.0)] == [10.0, 8.0]
    assert [choice.cost for choice in allocate([other, one], 19.0)] == [8.0, 10.0]


def test_more_budget_never_costs_more() -> None:
    layers = random_layers(2, 5, 9)
    costs = [sum(one.cost for one in allocate(layers, float(budget))) for budget in range(60, 400, 20)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(costs))


def test_the_frontier_keeps_what_nothing_beats() -> None:
    choices = [Choice(4, 1.0), Choice(2, 3.0), Choice(3, 3.0), Choice(5, 2.0), Choice(4, 0.5)]
    assert [(one.size, one.cost) for one in frontier(choices)] == [(2, 3.0), (4, 0.5)]
