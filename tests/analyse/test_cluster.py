"""K-Means is sklearn's, the elbow has known answers, medoids are those of brute force."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from chai_jax.analyse.cluster import cluster_count, clusters_of, curve, elbow, medoid
from chai_jax.errors import InputError
from chai_jax.plans.plan import round_up


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For sklearn called directly: beside other tests, OpenMP's threads mostly wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture(params=[0, 1])
def features(request: pytest.FixtureRequest) -> np.ndarray:
    """Ten heads in three loose crowds."""
    rng = np.random.default_rng(request.param)
    centres = rng.normal(size=(3, 10))
    return centres[rng.integers(0, 3, 10)] + 0.3 * rng.normal(size=(10, 10))


def test_curve_is_the_inertia_of_sklearn(features: np.ndarray) -> None:
    wanted = [KMeans(count, n_init=10, random_state=3).fit(features).inertia_ for count in range(1, 11)]
    np.testing.assert_allclose(curve(features, seed=3), wanted, atol=1e-12)
    assert curve(features)[0] == pytest.approx(((features - features.mean(0)) ** 2).sum())
    assert curve(features)[-1] == pytest.approx(0)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_assign_is_the_partition_of_sklearn(features: np.ndarray, count: int) -> None:
    labels = KMeans(count, n_init=10, random_state=0).fit(features).labels_
    clusters = clusters_of(features, count)
    assert len(clusters) == count
    for heads in clusters:
        assert list(heads) == sorted(np.flatnonzero(labels == labels[heads[0]]))
    assert [heads[0] for heads in clusters] == sorted(heads[0] for heads in clusters)
    assert sorted(sum(clusters, ())) == list(range(10))


def test_as_many_clusters_as_heads_merge_nothing_though_heads_be_equal() -> None:
    assert clusters_of(np.ones((4, 4)), 4) == ((0,), (1,), (2,), (3,))


def test_equal_heads_give_fewer_clusters_without_a_warning() -> None:
    features = np.repeat(np.eye(3), 2, axis=0)
    assert clusters_of(features, 5) == ((0, 1), (2, 3), (4, 5))
    assert curve(features)[2:] == pytest.approx(0)


@pytest.mark.parametrize(("points", "knee"), [(9, 3), (16, 4), (25, 5)])
def test_the_elbow_of_a_hyperbola_is_the_root_of_its_length(points: int, knee: int) -> None:
    # On the unit square y = 10/x over 1..n lies farthest below the diagonal where x^2 = n.
    assert elbow(10 / np.arange(1, points + 1)) == knee


@pytest.mark.parametrize(
    "inertias",
    [
        np.ones(8),
        np.zeros(8),
        np.linspace(10, 1, 8),
        np.asarray([3.0]),
        np.asarray([3.0, 0.0]),
        10 - np.arange(8.0) ** 2 / 5,
    ],
    ids=["flat", "zero", "straight", "one head", "two heads", "concave"],
)
def test_a_curve_without_a_bend_has_no_elbow(inertias: np.ndarray) -> None:
    assert elbow(inertias) is None


def test_the_elbow_of_separate_crowds_is_their_number() -> None:
    rng = np.random.default_rng(0)
    features = np.repeat(np.eye(4, 12), 3, axis=0) + 1e-3 * rng.normal(size=(12, 12))
    assert elbow(curve(features)) == 4
    assert clusters_of(features, 4) == ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))


def test_the_medoid_is_nearest_to_all_others(features: np.ndarray) -> None:
    heads = (1, 2, 5, 7, 9)

    def distance(head: int) -> float:
        return sum(math.dist(features[head], features[other]) for other in heads)

    assert medoid(features, heads) == min(heads, key=distance)


def test_of_equal_medoids_the_lowest_head_is_kept(features: np.ndarray) -> None:
    assert medoid(features, (3, 8)) == 3
    assert medoid(np.ones((6, 6)) / 3, (2, 4, 5)) == 2


@pytest.mark.parametrize(("wanted", "count"), [(1, 1), (10, 10), (0.5, 5), (0.7, 7), (0.71, 8), (0.01, 1)])
def test_cluster_count(features: np.ndarray, wanted: int | float, count: int) -> None:
    assert cluster_count(wanted, features) == count


def symmetric(heads: int, seed: int = 0) -> np.ndarray:
    """Standard normal noise for correlations, none on the diagonal."""
    noise = np.random.default_rng(seed).normal(size=(heads, heads))
    return (noise + noise.T) / math.sqrt(2) * (1 - np.eye(heads))


def test_the_elbow_resolves_to_a_count(features: np.ndarray) -> None:
    assert cluster_count("elbow", features) == elbow(curve(features))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8, 12, 32])
def test_heads_that_are_alike_are_one_cluster(heads: int) -> None:
    for noise in (0, 1e-12, 1e-8, 1e-4, 1e-2):
        assert cluster_count("elbow", np.ones((heads, heads)) + noise * symmetric(heads)) == 1


@pytest.mark.parametrize("heads", [2, 3, 4, 8, 12, 32])
def test_heads_with_nothing_in_common_stay_apart(heads: int) -> None:
    for noise in (0, 1e-12, 1e-4, 1e-2, 0.04):
        assert cluster_count("elbow", np.eye(heads) + noise * symmetric(heads)) == heads
    # Heads that never look at anything in particular correlate with none.
    assert cluster_count("elbow", np.zeros((heads, heads))) == heads


@pytest.mark.parametrize("heads", [2, 4, 8, 32])
def test_where_equal_correlations_become_one_cluster(heads: int) -> None:
    counts = [cluster_count("elbow", c + (1 - c) * np.eye(heads)) for c in (0.1, 0.5, 0.89, 0.9, 0.99)]
    assert counts == [heads] * 3 + [1] * 2


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_the_curve_of_equal_correlations_is_straight(correlation: float) -> None:
    """What the choice of `cluster_count` is derived from."""
    features = correlation + (1 - correlation) * np.eye(6)
    assert curve(features) == pytest.approx((1 - correlation) ** 2 * (6 - np.arange(1, 7)))
    assert elbow(curve(features)) is None


@pytest.mark.parametrize("noise", [0, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize(
    ("kinds", "count"), [([0, 0, 1, 1], 2), ([0, 0, 0, 1], 2), ([0] * 4 + [1] * 4, 2), ([0, 0, 1, 1, 2, 2, 3, 3], 4)]
)
def test_copies_of_several_heads_are_a_cluster_each(kinds: list[int], count: int, noise: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 500))[kinds] + noise * rng.normal(size=(len(kinds), 500))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert cluster_count("elbow", rows @ rows.T) == count


@pytest.mark.parametrize("wanted", [0, 11, -1, 1.0, 0.0, -0.5, True, "knee", float("nan")])
def test_other_counts_are_refused(features: np.ndarray, wanted: str | int | float) -> None:
    with pytest.raises(InputError, match="expected elbow, a number from 1 to 10"):
        cluster_count(wanted, features)


def test_rounding_up_is_not_fooled_by_floating_point() -> None:
    assert [round_up(fraction, 10) for fraction in (0.1, 0.7, 0.71, 1.0, 0.0)] == [1, 7, 8, 10, 0]
    assert 0.28 * 25 > 7
    assert round_up(0.28, 25) == 7
