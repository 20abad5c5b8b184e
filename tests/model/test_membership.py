"""K-Means inside jit against scikit-learn's, medoids against the offline ones, features against the offline probe's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs

from chai_jax.analyse.cluster import medoid
from chai_jax.evaluation.verify import TEXTS
from chai_jax.files.store import load
from chai_jax.model.membership import (
    Membership,
    assign_points,
    calibrated,
    cluster_heads,
    farthest_points,
    features,
    find_medoids,
    kmeans,
)
from chai_jax.model.self_attention import Seen

SHAPES = [(8, 6, 3), (12, 190, 6), (9, 15, 8)]


def cloud(seeds: int, heads: int, size: int) -> np.ndarray:
    """Points [seeds, heads, size], half of the seeds without structure, half in loose blobs."""
    random = np.random.default_rng(0)
    flat = random.standard_normal((seeds // 2, heads, size))
    blobs = [make_blobs(heads, size, centers=4, cluster_std=2.0, random_state=seed)[0] for seed in range(seeds // 2)]
    return np.concatenate([flat, np.stack(blobs)]).astype(np.float32)


def inertia(points: np.ndarray, labels: np.ndarray) -> float:
    groups = [points[labels == label].astype(np.float64) for label in np.unique(labels)]
    return sum(((group - group.mean(axis=0)) ** 2).sum() for group in groups)


@pytest.mark.parametrize(("heads", "size", "count"), SHAPES)
def test_kmeans_is_scikit_learns_from_the_same_start(heads: int, size: int, count: int) -> None:
    points = cloud(60, heads, size)
    starts = np.asarray(jax.jit(jax.vmap(partial(farthest_points, count=count)))(points))
    found = np.asarray(jax.jit(jax.vmap(kmeans))(points, starts))
    for mine, start, labels in zip(points, starts, found, strict=True):
        theirs = KMeans(count, init=start, n_init=1, tol=0, algorithm="lloyd").fit(mine)
        np.testing.assert_array_equal(labels, theirs.labels_)
        np.testing.assert_allclose(inertia(mine, labels), theirs.inertia_, rtol=1e-4)


def test_kmeans_is_scikit_learns_on_the_heads_of_a_trained_model(
    shared: Path, layers_seen: Callable[..., list[Seen]]
) -> None:
    model = load(shared / "models" / "opt-mini")
    tokens = np.asarray([model.tokenizer(text)["input_ids"][:10] for text in TEXTS], np.int32)

    found = layers_seen(model.config, model.spec, model.params, tokens, np.ones(tokens.shape, bool))
    points = np.concatenate([features(seen.probabilities) for seen in found])
    assert points.shape == (4 * 8, 8, 100)
    starts = np.asarray(jax.jit(jax.vmap(partial(farthest_points, count=4)))(points))
    for mine, start, labels in zip(points, starts, jax.jit(jax.vmap(kmeans))(points, starts), strict=True):
        theirs = KMeans(4, init=start, n_init=1, tol=0, algorithm="lloyd").fit(mine)
        np.testing.assert_array_equal(labels, theirs.labels_)
        np.testing.assert_allclose(inertia(mine, np.asarray(labels)), theirs.inertia_, rtol=1e-4)


def test_the_start_is_ever_the_farthest_point() -> None:
    for points in cloud(6, 9, 4):
        chosen = [int(np.argmax((points**2).sum(axis=1)))]
        while len(chosen) < 5:
            distances = ((points[:, None] - points[chosen]) ** 2).sum(axis=-1).min(axis=1)
            chosen.append(int(np.argmax(distances)))
        np.testing.assert_array_equal(farthest_points(jnp.asarray(points), 5), points[chosen])


def test_equal_heads_end_in_one_cluster() -> None:
    count = 4
    random = np.random.default_rng(1)
    kinds = np.concatenate([np.arange(count), random.integers(0, count, 12 - count)])
    points = random.standard_normal((4, count, 10)).astype(np.float32)[:, kinds]
    found = cluster_heads(jnp.asarray(points), count)
    for labels, medoids in zip(*jax.tree.map(np.asarray, (found.cluster_of, found.medoids)), strict=True):
        np.testing.assert_array_equal(labels[:, None] == labels, kinds[:, None] == kinds)
        np.testing.assert_array_equal(labels[medoids], np.arange(count))


DEGENERATE = {
    "all equal": np.ones((6, 6)),
    "all zero": np.zeros((6, 6)),
    "two kinds": np.eye(2, 6)[[0, 1, 1, 0, 0, 0]],
    "one far away": np.diag([0.0, 0, 0, 0, 0, 1e6]),
    "on a line": np.arange(6.0)[:, None] * np.ones(6),
}


@pytest.mark.parametrize("count", [1, 4, 6])
def test_no_cluster_is_ever_empty(count: int) -> None:
    points = jnp.asarray(np.stack(list(DEGENERATE.values())), jnp.float32)
    found = jax.tree.map(np.asarray, cluster_heads(points, count))
    for kind, labels, medoids in zip(DEGENERATE, found.cluster_of, found.medoids, strict=True):
        assert sorted(set(labels.tolist())) == list(range(count)), kind
        np.testing.assert_array_equal(labels[medoids], np.arange(count))


def test_an_empty_cluster_takes_the_farthest_point_that_is_not_its_clusters_last() -> None:
    points = jnp.asarray([[0.0], [1.0], [5.0], [20.0]])
    # 20 is farther from its centre than 5, but the last of its cluster.
    assert assign_points(points, jnp.asarray([[0.0], [99.0], [39.0], [99.0]])).tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize(("heads", "size", "count"), SHAPES)
def test_medoids_are_those_of_the_offline_clusters(heads: int, size: int, count: int) -> None:
    points = cloud(10, heads, size)
    labels = np.stack([np.random.default_rng(seed).permutation(np.arange(heads) % count) for seed in range(10)])
    found = jax.jit(jax.vmap(partial(find_medoids, count=count)))(points, labels.astype(np.int32))
    for mine, label, medoids in zip(points, labels, found, strict=True):
        expected = [medoid(mine.astype(np.float64), tuple(np.flatnonzero(label == c).tolist())) for c in range(count)]
        assert medoids.tolist() == expected


def test_features_are_centred_rows_without_the_first_key() -> None:
    attention = np.random.default_rng(0).random((2, 3, 5, 5)).astype(np.float32)
    found = np.asarray(features(jnp.asarray(attention))).reshape(2, 3, 5, 5)
    for b, h, row in np.ndindex(2, 3, 5):
        read = attention[b, h, row, 1 : row + 1]
        np.testing.assert_allclose(found[b, h, row, 1 : row + 1], read - read.mean() if row else read, atol=1e-6)
        assert not found[b, h, row, row + 1 :].any()
    assert not found[..., 0].any()
    assert (np.abs(found) > 1e-3).sum(axis=(2, 3)).max() == 9
    gradient = jax.grad(lambda attention: jnp.square(features(attention)).sum())(jnp.asarray(attention))
    assert not gradient.any()


def test_calibrated_membership_is_the_same_for_all_and_keeps_the_first_of_each_cluster() -> None:
    found = calibrated(((3, 0), (1,), (4, 2, 5)), 2)
    assert found.cluster_of.tolist() == [[0, 1, 2, 0, 2, 2]] * 2
    assert found.medoids.tolist() == [[3, 1, 4]] * 2
    heads = jnp.arange(2 * 6, dtype=jnp.float32).reshape(2, 6, 1, 1)
    assert found.keep(heads).ravel().tolist() == [3, 1, 4, 9, 7, 10]
    assert found.nbytes == 2 * (6 + 3) * 4


def test_where_chooses_sequence_by_sequence() -> None:
    one, other = calibrated(((0, 1),), 2), calibrated(((1, 0),), 2)
    mixed = one.where(jnp.asarray([True, False]), other)
    assert isinstance(mixed, Membership)
    assert mixed.medoids.tolist() == [[0], [1]]
