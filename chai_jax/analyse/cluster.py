"""Which heads of a layer look at the same tokens: K-Means, the elbow, medoids. Pure functions of arrays.

CHAI (Agarwal et al. 2024, arXiv 2403.08058, section 3.2) clusters the heads of each layer for every number of clusters
and picks that number by eye, where the error levels off. Here the eye is the Kneedle algorithm (Satopaa et al. 2011).
The features of a head are its row of the layer's head correlations (`chai_jax.analyse.probe.Probe.correlation`).

K-Means is here scikit-learn's, whose restarts find better clusters; `chai_jax.model.membership` has one of its own,
since it clusters every prompt's heads inside a compiled program, where shapes are static and nothing is drawn.
"""

import warnings

import numpy as np
from jaxtyping import Float
from kneed import KneeLocator
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from chai_jax.errors import InputError
from chai_jax.plans.plan import round_up

Clusters = tuple[tuple[int, ...], ...]
RESTARTS = 10  # of K-Means; the best of them counts
# Correlation c of heads that are alike and of heads with nothing in common: a head that stands in for another explains
# c^2 of its variance, here more than 80 % and less than 4 %.
ALIKE, APART = 0.9, 0.2


def _kmeans(features: Float[np.ndarray, "H F"], count: int, seed: int) -> KMeans:
    # So few points take 0.1 ms on one thread, and 100 times that while OpenMP gathers a crowd of them.
    with threadpool_limits(limits=1, user_api="openmp"), warnings.catch_warnings():
        # Heads with equal features leave clusters empty: those are dropped, and there is nothing to warn of.
        warnings.filterwarnings("ignore", message="Number of distinct clusters", category=ConvergenceWarning)
        return KMeans(count, n_init=RESTARTS, random_state=seed).fit(features)


def curve(features: Float[np.ndarray, "H F"], seed: int = 0) -> Float[np.ndarray, " H"]:
    """Inertia (summed squared distance to the nearest centre) of the heads in 1, 2, ... H clusters."""
    return np.asarray([_kmeans(features, count, seed).inertia_ for count in range(1, len(features) + 1)])


def elbow(inertias: Float[np.ndarray, " H"]) -> int | None:
    """The number of clusters where inertias of 1, 2, ... H clusters bend; None where they do not.

    A bend at one cluster would be a curve that falls slowly at first: it is none.
    """
    counts = np.arange(1, len(inertias) + 1)
    with warnings.catch_warnings():
        # A flat curve or a single point is divided by its range, zero, on the way to "no knee".
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="kneed|numpy")
        knee = KneeLocator(counts, inertias, curve="convex", direction="decreasing").knee
    return None if knee is None or knee == 1 else int(knee)


def clusters_of(features: Float[np.ndarray, "H F"], count: int, seed: int = 0) -> Clusters:
    """The heads in `count` clusters (fewer where features coincide): heads ascend in each, clusters by first head."""
    if count == len(features):
        return tuple((head,) for head in range(count))
    labels = _kmeans(features, count, seed).labels_
    members = [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]
    return tuple(sorted(members))


def balanced_clusters(features: Float[np.ndarray, "H F"], count: int, seed: int = 0) -> Clusters:
    """The heads in `count` clusters of equal size: K-Means' centres, each with as many places as it must fill.

    Which head gets which place is the assignment of the least summed squared distance.
    """
    centres = _kmeans(features, count, seed).cluster_centers_
    places = np.repeat(centres, len(features) // count, axis=0)
    distances = ((features[:, None] - places[None]) ** 2).sum(axis=-1)
    _, chosen = linear_sum_assignment(distances)
    labels = chosen // (len(features) // count)
    return tuple(sorted(tuple(np.flatnonzero(labels == label).tolist()) for label in range(count)))


def medoid(features: Float[np.ndarray, "H F"], heads: tuple[int, ...]) -> int:
    """The head of a cluster with the smallest summed distance to the others; the lowest of several."""
    points = features[list(heads)]
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1).sum(axis=1)
    return heads[int(np.argmin(distances))]


def cluster_count(wanted: str | int | float, features: Float[np.ndarray, "H F"], seed: int = 0) -> int:
    """Resolve a number of clusters: `"elbow"`, a number of heads, a ratio below 1 of H, or `"correlation:0.9"`: as few
    as leave every head so correlated with the one that stands for it.

    Raises:
        InputError: anything else, or more clusters than heads.
    """
    heads = len(features)
    if wanted == "elbow":
        return _elbow_count(features, seed)
    if isinstance(wanted, str) and (threshold := _threshold(wanted)) is not None:
        return next(count for count in range(1, heads + 1) if least_correlation(features, count, seed) >= threshold)
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 1 <= wanted <= heads:
        return wanted
    if isinstance(wanted, float) and 0 < wanted < 1:
        return round_up(wanted, heads)
    raise InputError(
        f"clusters is {wanted!r}; expected elbow, a number from 1 to {heads} (the heads), a ratio between 0 and 1, or "
        "correlation:0.9 (a number up to 1)"
    )


def _elbow_count(features: Float[np.ndarray, "H H"], seed: int) -> int:
    """The elbow, between heads that are all alike (one cluster) and heads that are all apart (H, as without an elbow).

    An elbow alone cannot tell these two. Let all heads correlate by c. A head's row is then c + (1 - c) e_h, and k
    clusters leave the inertia (1 - c)^2 (H - k): a straight line, without a bend for c near 1 as for c = 0. And as the
    curve is judged by its own height, what bends may be noise in either. So correlations decide first: one cluster if a
    single head stands for every other with c >= `ALIKE`, none merged if no two heads reach `APART`.
    """
    if least_correlation(features, 1, seed) >= ALIKE:
        return 1
    heads = len(features)
    if features[~np.eye(heads, dtype=bool)].max() < APART:
        return heads
    return elbow(curve(features, seed)) or heads


def least_correlation(features: Float[np.ndarray, "H H"], count: int, seed: int = 0) -> float:
    """The lowest correlation of any head with its cluster's medoid; 1 where no heads are merged."""
    kept = ((head, medoid(features, heads)) for heads in clusters_of(features, count, seed) for head in heads)
    return min((float(features[pair]) for pair in kept if pair[0] != pair[1]), default=1.0)


def _threshold(wanted: str) -> float | None:
    """0.9 of `correlation:0.9`; None of anything else."""
    name, _, value = wanted.partition(":")
    try:
        return float(value) if name == "correlation" and float(value) <= 1 else None
    except ValueError:
        return None
